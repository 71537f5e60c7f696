"""Several processes as one run, on this machine: real processes, a real coordinator, loopback."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from cli.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from train.distributed import processes
from train.distributed.processes import END_SECONDS, HEARTBEAT_SECONDS, join_processes
from weights.run import Run, read_metrics

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "configs/scenes/dvae.py:debug"
LONG = ("--config.steps=100000", "--config.checkpoint.every=20", "--config.evaluate.every=100000")


@pytest.mark.parametrize("where", ["here", "host:port,2,0", "host:1,2", "host:1,2,2", "host:1,two,0"])
def test_a_wrong_address_is_named(where):
    with pytest.raises(UserError, match="--distributed="):
        join_processes(where)


def test_without_a_cluster_a_process_is_on_its_own(monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    join_processes("")
    join_processes("none")

    def initialize(**arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="finds no cluster"):
        join_processes("auto")


@pytest.mark.parametrize(
    ("variables", "tpu", "joined"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, False, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False, False),  # a batch script, which is one process
        ({"JAX_PLATFORMS": ""}, True, True),
        ({"JAX_PLATFORMS": "tpu,cpu"}, True, True),
        ({"JAX_PLATFORMS": "cpu"}, True, False),
    ],
)
def test_slurm_and_cloud_tpu_are_detected(monkeypatch, variables, tpu, joined):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(processes, "has_tpu", lambda: tpu)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    join_processes("")
    assert len(calls) == joined and not any("coordinator_address" in call for call in calls)


@pytest.mark.slow
def test_a_signal_to_one_saves_the_same_step_on_both_and_one_process_goes_on(scenes_dir, start_pair, tmp_path):
    pair = start_pair(CONFIG, tmp_path / "run", *LONG)
    pair.wait_for_step(3)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.codes() == [EXIT_PREEMPTED, EXIT_PREEMPTED], pair.output()
    # Process 0 alone speaks, and its log is whole.
    said = re.search(r"SIGTERM: saved step (\d+); continue with: python -m train", pair.output(0))
    assert said and "continue with" not in pair.output(1)
    saved = int(said[1])
    assert Run.open(tmp_path / "run").latest_step() == saved
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == list(range(1, saved + 1))
    # What two processes saved, one reads.
    command = [sys.executable, "-m", "train", f"--config={CONFIG}"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={scenes_dir}", *LONG[1:]]
    command += [f"--config.steps={saved + 2}"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == EXIT_OK and f"continuing at step {saved}" in again.stdout, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_other(start_pair, tmp_path, killed):
    patience = HEARTBEAT_SECONDS // 3  # the test need not wait as long as a run does
    before = f"from train.distributed import processes; processes.HEARTBEAT_SECONDS = {patience}"
    pair = start_pair(CONFIG, tmp_path / "run", *LONG, before=before)
    pair.wait_for_step(3)
    pair.processes[killed].kill()
    died = time.monotonic()
    assert pair.codes()[1 - killed] not in (EXIT_OK, EXIT_PREEMPTED)
    assert time.monotonic() - died < patience + END_SECONDS
    # Now and then Gloo, by which CPUs talk, ends the process before JAX does: its ranks are in different collectives.
    said = "another task died|another process|gloo::EnforceNotMet"
    assert re.search(said, pair.output(1 - killed)), pair.output(1 - killed)


@pytest.mark.slow
def test_a_mistake_ends_both(start_pair, tmp_path):
    pair = start_pair(CONFIG, tmp_path / "run", "--config.data.split=tests")
    assert pair.codes() == [EXIT_USER_ERROR, EXIT_USER_ERROR], pair.output()
    # Only process 0 looks at the workdir, and both end with what it found.
    (tmp_path / "file").write_text("")
    (tmp_path / "file.d").mkdir()
    pair = start_pair(CONFIG, tmp_path / "file", "--config.steps=2")
    assert pair.codes() == [EXIT_USER_ERROR, EXIT_USER_ERROR], pair.output()
    assert all("cannot write the workdir" in pair.output(index) for index in range(2))


@pytest.mark.slow
def test_a_broken_checkpoint_is_passed_over_by_both(start_pair, tmp_path):
    settings = ("--config.steps=4", "--config.checkpoint.every=2")
    assert start_pair(CONFIG, tmp_path / "run", *settings).codes() == [EXIT_OK, EXIT_OK]
    before = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    for path in (tmp_path / "run" / "checkpoints" / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    pair = start_pair(CONFIG, tmp_path / "run", *settings)
    assert pair.codes() == [EXIT_OK, EXIT_OK], pair.output()
    assert "the one before it is used" in pair.output(0)
    after = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["loss"] for row in after] == [row["loss"] for row in before]
