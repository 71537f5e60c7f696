"""The launcher of one GPU machine, run for real against the stand-ins of `launch_stage`."""

import signal

import pytest

from .launch_stage import (
    ARGUMENTS,
    until,
)

HERE = ["--config=c.py", "--workdir=runs/x", ARGUMENTS[2]]


def test_gpu_installs_trains_and_repeats_only_while_preempted(stage):
    stage.rules((r"^python -m train", [{"code": 75}, {"code": 75}, {}]))
    result = stage.launch("gpu", "run", "--", *HERE)
    assert result.returncode == 0, result.stderr
    install = ["install", "-c", f"{stage.clone}/requirements.lock", "-e", f"{stage.clone}[cuda]"]
    assert stage.record() == [
        ["make", "--no-print-directory", "-C", str(stage.clone), ".venv/.base"],
        ["python", "-m", "pip", "--disable-pip-version-check", "--quiet", *install],
        *[["python", "-m", "train", *HERE]] * 3,
    ]
    assert not (stage.clone / ".venv-incomplete").exists()


def test_an_installation_that_was_cut_short_is_left_for_make_to_repeat(stage):
    stage.rules((r"^python -m pip", [{"code": 137}]))
    assert stage.launch("gpu", "run", "--", *HERE).returncode != 0
    assert (stage.clone / ".venv-incomplete").exists()
    assert stage.calls("train") == []


@pytest.mark.parametrize(("code", "ends_with"), [(1, 1), (2, 2), (137, 1)])
def test_gpu_does_not_repeat_what_failed(code, ends_with, stage):
    stage.rules((r"^python", [{"code": code}]))
    assert stage.launch("gpu", "train", "--", *HERE).returncode == ends_with
    assert len(stage.record()) == 1


def test_gpu_gives_up_without_progress_and_goes_on_with_it(stage):
    stage.rules((r"^python", [{"code": 75}]))
    result = stage.launch("gpu", "train", "--max_stalled=3", "--", *HERE)
    assert result.returncode == 1 and "giving up: 3 starts" in result.stderr
    assert len(stage.record()) == 3
    stage.forget()
    folder = stage.clone / "runs" / "x" / "checkpoints"
    starts = [{"code": 75}, {"code": 75, "checkpoint": str(folder / "8")}, {"code": 75}, {}]
    stage.rules((r"^python", starts))
    assert stage.launch("gpu", "train", "--max_stalled=2", "--", *HERE).returncode == 0
    assert len(stage.record()) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_gpu_passes_a_signal_on_and_does_not_start_again(number, stage):
    stage.rules((r"^python", [{"code": 75, "until": signal.Signals(number).name}]))
    process = stage.start("bash", stage.clone / "scripts/launch/gpu.sh", "train", "--", *HERE)
    until(lambda: stage.record())
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert len((stage.folder / "record").read_text().splitlines()) == 1  # no other start, nor a pause before one


def test_gpu_goes_on_without_its_terminal(stage):
    stage.rules((r"^python", [{"code": 75, "out": "first\n"}, {"out": "second\n"}]))
    result = stage.launch("gpu", "train", "--detach=nohup", "--", *HERE)
    assert result.returncode == 0, result.stderr
    log = stage.clone / "runs" / "x.log"
    until(lambda: "exit code 0" in log.read_text())
    assert log.read_text().index("first") < log.read_text().index("second")
    assert stage.record() == [["python", "-m", "train", *HERE]] * 2

    stage.forget()
    assert stage.launch("gpu", "train", "--detach=tmux", "--", *HERE).returncode == 0
    (command,) = stage.record()
    assert command[: command.index("bash")] == ["tmux", "new-session", "-d", "-s", "x", "-c", str(stage.clone)]
    stage.forget()
    stage.rules((r"^python", [{"out": "third\n"}]))
    assert stage.run(*command[command.index("bash") :]).returncode == 0
    assert stage.record() == [["python", "-m", "train", *HERE]]
    until(lambda: "third" in log.read_text())


def test_gpu_detaches_once_though_a_variable_says_so(stage):
    stage.rules((r"^python", [{"out": "only\n"}]))
    assert stage.launch("gpu", "train", "--", *HERE, TESSERA_DETACH="nohup").returncode == 0
    log = stage.clone / "runs" / "x.log"
    until(lambda: "exit code 0" in log.read_text())
    assert stage.record() == [["python", "-m", "train", *HERE]]
