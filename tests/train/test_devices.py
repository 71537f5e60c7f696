"""One run on many devices is the run on one device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weights.run import Run, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def run_on(devices: int, config: str, scenes_dir: Path, workdir: Path, *overrides: str) -> None:
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "train", f"--config={config}", f"--workdir={workdir}", *overrides]
    result = subprocess.run(
        [*command, f"--config.data.data_dir={scenes_dir}"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scenes/dvae.py:gumbel", "scenes/dvae.py:debug", "scenes/dalle.py:debug"])
def test_eight_devices_give_the_losses_of_one(name, scenes_dir, tmp_path):
    overrides = ["--config.steps=8", "--config.batch_size=16", "--config.log.every=1", "--config.wandb.mode=disabled"]
    overrides += ["--config.evaluate.every=1000", "--config.optimizer.schedule.warmup_steps=1"]
    for devices in (1, 8):
        run_on(devices, f"configs/{name}", scenes_dir, tmp_path / str(devices), *overrides)
    assert losses(tmp_path / "8") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_moves_between_numbers_of_devices(scenes_dir, tmp_path):
    config = "configs/scenes/dvae.py:debug"
    fixed = "--config.optimizer.schedule.decay_steps=100"
    run_on(8, config, scenes_dir, tmp_path / "moved", fixed, "--config.steps=3")
    run_on(1, config, scenes_dir, tmp_path / "moved", fixed, "--config.steps=6")
    run_on(1, config, scenes_dir, tmp_path / "stayed", fixed, "--config.steps=6")
    assert Run.open(tmp_path / "moved").latest_step() == 6
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "stayed"), rel=1e-4)
