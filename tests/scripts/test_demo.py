"""The demo, whole, at debug size."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_ctrl_c_stops_the_demo_after_a_save(start_process, scenes_dir, tmp_path):
    command = [sys.executable, "-m", "scripts.demo", f"--workdir={tmp_path}/demo", f"--data_dir={scenes_dir}"]
    process = start_process(command, cwd=ROOT, stderr=subprocess.PIPE)
    metrics = tmp_path / "demo" / "dvae" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and '"step": 20' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to every process of the group
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "SIGINT: saved step" in errors and "the same command continues" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_the_demo_ends_in_a_self_contained_report_and_continues(tmp_path):
    command = [sys.executable, "-m", "scripts.demo", "--debug", "--num=40", f"--workdir={tmp_path}/demo"]
    command += [f"--data_dir={tmp_path}/data"]
    first = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    report = (tmp_path / "demo" / "report.html").read_text()
    assert f"{tmp_path}/demo/report.html" in first.stdout
    assert report.count("data:image/png;base64,") >= 4  # reconstructions, both splits, samples
    assert "http-equiv" not in report and 'src="http' not in report
    assert report.count("<svg") == 4
    assert "held_out (N = 40)" in report and "What to try next" in report

    again = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and again.stdout.count("is complete") == 2
