"""Killed again and again, a run ends like one that was not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.chaos import compare_runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_five_kills_change_nothing(scenes_dir, tmp_path):
    command = [sys.executable, "-m", "scripts.chaos", "--config=configs/scenes/dvae.py:debug", "--kills=5"]
    command += ["--seed=23"]  # one kill while starting, one while training, three soon after a save has begun
    command += [f"--workdir={tmp_path / 'chaos'}", f"--config.data.data_dir={scenes_dir}"]
    command += [
        "--config.steps=200",
        "--config.optimizer.schedule.decay_steps=0",  # learns to the end, so that each checkpoint is another
        "--config.checkpoint.every=10",
        "--config.evaluate.every=50",
        "--config.wandb.mode=offline",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "killed 5 times" in result.stdout and "saving" in result.stdout and "alike to the bit" in result.stdout
    assert "one W&B id" in result.stdout

    # And a difference would have been seen.
    whole, killed = tmp_path / "chaos" / "whole", tmp_path / "chaos" / "killed"
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    rows[7]["loss"] += 1e-7
    (killed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    next((killed / "samples").iterdir()).write_bytes(b"")
    assert compare_runs(whole, killed) == ["metrics.jsonl", "samples"]
    shutil.rmtree(killed / "checkpoints" / "200")
    shutil.copytree(killed / "checkpoints" / "190", killed / "checkpoints" / "200")
    assert any(line.startswith("step 200: params/dvae/") for line in compare_runs(whole, killed))
