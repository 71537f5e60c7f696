"""The launcher of SLURM, run for real against the stand-ins of `launch_stage`."""

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from .launch_stage import (
    ARGUMENTS,
    Stage,
    until,
)


def submitted(stage: Stage, *settings: str, workdir: str = "runs/x") -> list[str]:
    """Submits a job and returns sbatch's arguments, and the script as its last."""
    arguments = [f"--workdir={workdir}", *ARGUMENTS[::2]]
    result = stage.launch("slurm", "submit", *settings, "--", *arguments)
    assert result.returncode == 0, result.stderr
    (command,) = stage.record()
    stage.forget()
    return command


def run_job(stage: Stage, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Does what SLURM does with sbatch's arguments, in the folder that they name."""
    (folder,) = [word.removeprefix("--chdir=") for word in command if word.startswith("--chdir=")]
    script = command[-1].removeprefix("--wrap=")
    return stage.run("sh", "-c", script, cwd=Path(folder), SLURM_JOB_ID="7", **environment)


def test_a_slurm_job_asks_for_one_process_a_gpu_and_for_a_signal_before_its_end(stage):
    command = submitted(stage, "--nodes=2", "--gpus_per_node=4", "--time=1:00:00", "--cpus_per_task=3")
    assert command[:-1] == [
        "sbatch",
        "--job-name=x",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--signal=TERM@300",
        "--requeue",
        "--open-mode=append",
        f"--output={stage.clone}/%x-%j.log",
        f"--chdir={stage.clone}",
        "--gpus-per-node=4",
        "--time=1:00:00",
        "--cpus-per-task=3",
    ]
    result = run_job(stage, command)
    assert result.returncode == 0, result.stderr
    python = str(stage.clone / ".venv" / "bin" / "python")
    train = [python, "-m", "train", "--workdir=runs/x", *ARGUMENTS[::2], "--distributed=auto"]
    assert stage.record() == [["srun", "--kill-on-bad-exit=0", "--wait=600", *train]]


def test_one_process_a_node_sees_all_its_gpus(stage):
    command = submitted(stage, "--nodes=2", "--gpus_per_node=4", "--processes=node")
    assert "--ntasks-per-node=1" in command and "--gpus-per-node=4" in command
    run_job(stage, command)
    assert stage.record()[0][-2:] == ["--distributed=auto", "ids=0,1,2,3"]


def test_a_job_of_one_process_is_not_distributed(stage):
    run_job(stage, submitted(stage, "--gpus_per_node=1"))
    assert stage.record()[0][-1] == ARGUMENTS[2]


@pytest.mark.parametrize(("code", "ends_with"), [(0, 0), (1, 1), (2, 2), (137, 1)])
def test_a_slurm_job_that_was_not_preempted_is_not_requeued(code, ends_with, stage):
    command = submitted(stage, "--gpus_per_node=1")
    stage.rules((r"^srun", [{"code": code}]), (r"^squeue", [{"out": "RUNNING\n"}]))
    assert run_job(stage, command).returncode == ends_with
    assert stage.calls(r"^scontrol") == []


def test_a_preempted_slurm_job_is_requeued_unless_slurm_ends_it(stage):
    command = submitted(stage, "--gpus_per_node=1")
    stage.rules((r"^srun", [{"code": 75}]), (r"^squeue", [{"out": "RUNNING\n"}, {"out": "CANCELLED\n"}]))
    assert run_job(stage, command).returncode == 0
    assert stage.calls(r"^scontrol") == [["scontrol", "requeue", "7"]]
    assert run_job(stage, command, SLURM_RESTART_COUNT="1").returncode == 75
    assert len(stage.calls(r"^scontrol")) == 1


def test_a_slurm_job_without_progress_is_requeued_a_few_times(stage):
    command = submitted(stage, "--gpus_per_node=1", "--max_stalled=3")
    run = stage.clone / "runs" / "x" / "checkpoints"
    progress = [{"code": 75}, {"code": 75}, {"code": 75, "checkpoint": str(run / "8")}, {"code": 75}]
    stage.rules((r"^srun", progress), (r"^squeue", [{"out": "RUNNING\n"}]))
    codes = [run_job(stage, command, SLURM_RESTART_COUNT=str(start)).returncode for start in range(6)]
    assert codes == [0, 0, 0, 0, 0, 1]  # the third made a checkpoint, the three after it did not
    assert run_job(stage, command).returncode == 0  # a new job begins to count anew


def test_sigterm_to_a_slurm_job_waits_for_the_save(stage):
    command = submitted(stage, "--gpus_per_node=1")
    stage.rules((r"^srun", [{"code": 75, "until": "go on"}]), (r"^squeue", [{"out": "PREEMPTED\n"}]))
    job = stage.start("sh", "-c", command[-1].removeprefix("--wrap="), cwd=stage.clone, SLURM_JOB_ID="7")
    until(lambda: stage.calls(r"^srun"))
    job.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert job.poll() is None
    with (stage.folder / "record").open("a") as record:
        record.write('["go on"]\n')
    job.communicate(timeout=60)
    assert job.returncode == 75
