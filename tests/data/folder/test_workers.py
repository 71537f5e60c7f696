"""Processes that read pictures end with the command, and say nothing of their own when it is interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]

PARENT = """
import sys, time
from data.folder.workers import Workers

def task(name, seconds):
    open(name, "w").close()
    time.sleep(seconds)
    return 1

if __name__ == "__main__":
    import functools
    with Workers(3) as workers:
        # One is busy for long; the others soon have nothing to do.
        workers.run([functools.partial(task, str(n), 600 if n == 0 else 0) for n in range(3)], 3, "reading")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_busy_and_idle_processes_end_with_the_command(number: int, tmp_path: Path, start_process):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "parent.py"]
    parent = start_process(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not all((tmp_path / name).is_file() for name in "012"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)  # until two of them wait for a task
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 3
    interrupted = number == signal.SIGINT  # as a terminal sends it, to all of them
    (os.killpg if interrupted else os.kill)(parent.pid, number)
    _, said = parent.communicate(timeout=60)
    assert said.count("Traceback") == interrupted and "SpawnProcess" not in said
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
