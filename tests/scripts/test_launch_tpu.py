"""The launcher of Cloud TPU and its workers, run for real against the stand-ins of `launch_stage`."""

import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence

import pytest

from .launch_stage import (
    ACTIVE,
    ARGUMENTS,
    BEGIN,
    LOST,
    MISSING,
    NODE,
    READY,
    REQUEST,
    SETUP,
    STEP,
    TPU,
    TRAIN,
    WAITING,
    Stage,
    same_words,
    until,
    verbs,
)


def test_a_tpu_run_asks_sets_up_trains_and_gives_back(clone):
    result = clone.train_on_tpu()
    assert result.returncode == 0, result.stderr
    commit = clone.git("rev-parse", "HEAD")
    tpus, zone = ["gcloud", "compute", "tpus"], "--zone=us-east5-b"
    look = [*tpus, "queued-resources", "describe", "slice", "--format=value(state.state)", zone]
    worker = "bash tessera/scripts/launch/tpu_worker.sh"
    setup = "set -e; [ -d tessera/.git ] || git init --quiet tessera; cd tessera; git fetch --quiet --force "
    setup += "../tessera.bundle '+refs/heads/*:refs/launch/*' +HEAD:refs/launch-head; git checkout --quiet --force "
    setup += f"--detach {commit}; cd ..; {worker} install --python_version=3.11 --mount=/mnt/tessera --bucket=my-runs"
    train = f"{worker} train --attempt=N --xla= -- {shlex.join(ARGUMENTS[:2])} '--config.x=it'\\''s \"a  b\" $HOME;'"
    bundle = str(clone.clone / ".git" / "launch.bundle")
    bucket = ["buckets", "describe", "gs://my-runs", "--raw", "--format=value(hierarchicalNamespace.enabled)"]
    create = ["create", "slice", "--node-id=slice", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"]

    def ssh(which: str, line: str) -> list[str]:
        return [*tpus, "tpu-vm", "ssh", "slice", f"--worker={which}", f"--command={line}", "--quiet", zone]

    assert same_words(clone.record()) == [
        ["gcloud", "storage", *bucket],
        look,
        [*tpus, "queued-resources", *create, zone, "--spot", "--quiet"],
        look,
        [*tpus, "tpu-vm", "scp", bundle, "slice:tessera.bundle", "--worker=all", "--quiet", zone],
        ssh("all", f"{setup} --nfs="),
        ssh("0", f"{worker} step --workdir=/mnt/tessera/run"),
        ssh("all", f"{train} --distributed=auto"),
        [*tpus, "queued-resources", "delete", "slice", "--force", "--quiet", zone],
    ]


def test_a_preempted_tpu_run_continues_on_the_same_slice(clone):
    result = clone.train_on_tpu((TRAIN, [{"code": 75}, {"code": 75}, {}]))
    assert result.returncode == 0
    assert verbs(clone) == [*BEGIN, "train", "train", "train", "delete"]
    assert (clone.folder / "record").read_text().count('["sleep", "30"]') == 2


@pytest.mark.parametrize(("code", "ends_with"), [(1, 1), (2, 2), pytest.param(137, 1, marks=pytest.mark.slow)])
def test_a_tpu_run_that_fails_is_not_repeated_and_its_slice_is_deleted(code, ends_with, clone):
    result = clone.train_on_tpu((TRAIN, [{"code": code}]))
    assert result.returncode == ends_with
    assert verbs(clone) == [*BEGIN, "train", "delete"]


@pytest.mark.parametrize(
    ("code", "requests", "nodes"),
    [
        (1, [MISSING, ACTIVE, LOST, MISSING, ACTIVE], [READY]),
        (75, [MISSING, ACTIVE, ACTIVE, MISSING, ACTIVE], [{"out": "PREEMPTED\n"}, READY]),
        (255, [MISSING, ACTIVE, {"code": 1, "err": "no network"}, MISSING, MISSING, ACTIVE], [READY]),
    ],
    ids=["request suspended", "node preempted", "all gone"],
)
def test_a_lost_slice_is_made_anew(code, requests, nodes, clone):
    result = clone.train_on_tpu((TRAIN, [{"code": code}, {}]), (REQUEST, requests), (NODE, nodes))
    assert result.returncode == 0, result.stderr
    assert verbs(clone) == [*BEGIN, "train", "delete", *BEGIN, "train", "delete"]


@pytest.mark.slow
def test_a_preemption_that_shows_late_is_seen(clone):
    """Workers feel it first: their training fails, and the request is suspended a minute later."""
    states = [MISSING, ACTIVE, ACTIVE, ACTIVE, LOST, MISSING, ACTIVE]
    result = clone.train_on_tpu((TRAIN, [{"code": 1}, {}]), (REQUEST, states))
    assert result.returncode == 0
    assert verbs(clone) == [*BEGIN, "train", "delete", *BEGIN, "train", "delete"]


def test_a_lost_connection_finds_the_training_again(clone):
    result = clone.train_on_tpu((TRAIN, [{"code": 255}, {}]))
    assert result.returncode == 0
    assert verbs(clone) == [*BEGIN, "train", "train", "delete"]
    first, second = clone.calls(TRAIN)
    assert first == second  # the same attempt


def test_attempts_without_progress_are_bounded(clone):
    clone.rules((TRAIN, [{"code": 75}]))
    result = clone.launch("tpu_vm", "run", *TPU, "--max_stalled=2", "--", *ARGUMENTS)
    assert result.returncode == 1 and "giving up: 2 attempts" in result.stderr
    assert verbs(clone) == [*BEGIN, "train", "train", "delete"]


@pytest.mark.slow
def test_attempts_that_make_progress_are_not_counted(clone):
    steps = [{"out": f"{step}\n"} for step in range(4)]
    clone.rules((STEP, steps), (TRAIN, [*[{"code": 75}] * 3, {}]))
    result = clone.launch("tpu_vm", "run", *TPU, "--max_stalled=2", "--", *ARGUMENTS)
    assert result.returncode == 0
    assert verbs(clone).count("train") == 4


@pytest.mark.parametrize(
    ("rule", "expected", "message"),
    [
        ((SETUP, [{"code": 1}]), [*BEGIN, "delete"], "exit code 1"),
        ((r"queued-resources create", [{"code": 1}]), ["create", "delete"], "exit code 1"),
        ((REQUEST, [MISSING, WAITING, {"out": "FAILED\n"}]), ["create", "delete"], "the request for slice is FAILED"),
        ((REQUEST, [MISSING, WAITING]), ["create", "delete"], "no slice after 90 s"),
    ],
    ids=["setup", "create", "request failed", "waited too long"],
)
def test_a_slice_is_deleted_when_something_before_training_fails(rule, expected, message, clone):
    clone.rules(rule)
    result = clone.launch("tpu_vm", "run", *TPU, "--wait=90", "--", *ARGUMENTS)
    assert result.returncode == 1 and message in result.stderr
    assert verbs(clone) == expected


def test_a_slice_that_cannot_be_deleted_is_named(clone):
    result = clone.train_on_tpu((r"queued-resources delete", [{"code": 1}]))
    assert "MAY STILL EXIST AND BE BILLED; run: scripts/launch/tpu_vm.sh delete --name=slice" in result.stderr


@pytest.mark.parametrize("answer", [{"out": "\n"}, {"code": 1}], ids=["flat", "unreadable"])
def test_no_slice_is_asked_for_when_the_bucket_will_not_do(answer, clone):
    result = clone.train_on_tpu((r"buckets describe", [answer]))
    assert result.returncode == 2 and "gs://my-runs" in result.stderr
    assert len(clone.record()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_gives_the_slice_back(number, clone):
    clone.rules((TRAIN, [{"code": 75, "until": "tpu_worker.sh stop"}]))
    process = clone.start("bash", clone.clone / "scripts/launch/tpu_vm.sh", "run", *TPU, "--", *ARGUMENTS)
    until(lambda: clone.calls(TRAIN))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert verbs(clone) == [*BEGIN, "train", "stop", "delete"]
    assert '"sleep"' not in (clone.folder / "record").read_text()  # no pause before another attempt


def test_a_signal_while_waiting_for_a_slice_takes_the_request_back(clone):
    clone.rules((REQUEST, [MISSING, WAITING]))
    process = clone.start("bash", clone.clone / "scripts/launch/tpu_vm.sh", "run", *TPU, "--", *ARGUMENTS)
    until(lambda: len(clone.calls(REQUEST)) > 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert verbs(clone) == ["create", "delete"]


# What a worker does. Its home is the stage's folder, where `tessera` stands for the clone that setup makes.


def line_for_workers(stage: Stage, pattern: str) -> list[str]:
    """The shell line that gcloud was given for workers, as sshd there runs it.

    gcloud splits --command at single spaces, and ssh joins the words with spaces.
    """
    words = [word for word in stage.calls(pattern)[0] if word.startswith("--command=")][0]
    return ["bash", "-c", " ".join(words.removeprefix("--command=").split(" "))]


@pytest.fixture
def worker(clone: Stage) -> Callable[..., list[str]]:
    """Makes the clone a worker's; the fixture's function gives the line of a train command."""
    (clone.folder / "tessera").symlink_to(clone.clone)

    def line(*arguments: str) -> list[str]:
        clone.forget()
        command = ["train", "--name=slice", "--zone=z", "--", *(arguments or ARGUMENTS)]
        assert clone.launch("tpu_vm", *command).returncode == 0
        found = line_for_workers(clone, TRAIN)
        clone.forget()
        return found

    return line


def test_setup_gives_a_worker_the_commit_python_and_the_bucket(clone):
    """Real git on both sides; a second setup of another commit works too."""
    clone.stand_in(clone.folder / "bin" / "mountpoint")
    for content in ("first", "second"):
        (clone.clone / "file").write_text(content)
        clone.git("add", "--all")
        clone.git("commit", "--quiet", "--message=x")
        clone.forget()
        assert clone.launch("tpu_vm", "setup", *TPU).returncode == 0
        shutil.copy(clone.clone / ".git" / "launch.bundle", clone.folder / "tessera.bundle")
        line = line_for_workers(clone, SETUP)
        clone.forget()
        clone.rules((r"^mountpoint", [{"code": 1}]))
        result = clone.run(*line)
        assert result.returncode == 0, result.stderr
        assert (clone.folder / "tessera" / "file").read_text() == content
    assert clone.record() == [
        ["uv", "venv", "--quiet", "--python", "3.11", ".venv"],
        ["uv", "pip", "install", "--quiet", "--python", ".venv/bin/python", "-c", "requirements.lock", "-e", ".[tpu]"],
        ["mountpoint", "--quiet", "/mnt/tessera"],
        ["sudo", "mkdir", "-p", "/mnt/tessera"],
        ["sudo", "chown", f"{os.getuid()}:{os.getgid()}", "/mnt/tessera"],
        [
            "gcsfuse",
            "--metadata-cache-ttl-secs=0",
            "--metadata-cache-negative-ttl-secs=0",
            "--kernel-list-cache-ttl-secs=0",
            "my-runs",
            "/mnt/tessera",
        ],
    ]


@pytest.mark.parametrize("code", [0, 75])
def test_a_worker_gets_the_arguments_unchanged_and_gives_the_code_back(code, clone, worker):
    line = worker()
    clone.rules((r"^python", [{"code": code, "out": "step 1\n", "err": "a warning\n"}]))
    result = clone.run(*line)
    assert result.returncode == code, result.stderr
    assert "step 1" in result.stdout and "a warning" in result.stdout
    assert clone.record() == [["python", "-m", "train", *ARGUMENTS, "--distributed=auto"]]


@pytest.mark.slow
def test_a_worker_trains_on_when_its_connection_is_lost_and_the_same_command_finds_it(clone, worker):
    line = worker()
    clone.rules((r"^python", [{"code": 75, "until": "go on"}]))
    first = clone.start(*line)
    until(lambda: clone.record())
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = clone.start(*line)
    time.sleep(0.3)
    assert second.poll() is None
    other = clone.run(*worker_line_of(line, "another"))
    assert other.returncode == 2 and "training something else" in other.stderr
    with (clone.folder / "record").open("a") as record:
        record.write('["go on"]\n')
    out, errors = second.communicate(timeout=60)
    assert second.returncode == 75, errors
    assert clone.run(*line).returncode == 75  # it ended while the connection was lost
    assert len(clone.calls(r"^python")) == 1
    assert clone.run(*[word.replace("--attempt=", "--attempt=1") for word in line]).returncode == 75
    assert len(clone.calls(r"^python")) == 2  # a new attempt is a new process


def worker_line_of(line: Sequence[str], workdir: str) -> list[str]:
    """The same line for another run folder."""
    return [word.replace("/mnt/tessera/run", f"/mnt/tessera/{workdir}") for word in line]


def test_stop_reaches_the_training_process_of_a_worker(clone, worker):
    line = worker()
    clone.rules((r"^python", [{"code": 75, "until": "SIGTERM"}]))
    process = clone.start(*line)
    until(lambda: clone.record())
    script = clone.clone / "scripts" / "launch" / "tpu_worker.sh"
    assert clone.run("bash", script, "stop").returncode == 0
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert clone.run("bash", script, "stop").returncode == 0  # nothing to stop


def test_the_newest_checkpoint_is_found(stage):
    for name in ("9", "10", "000000", "11.orbax-checkpoint-tmp", "12.unreadable"):
        (stage.folder / "run" / "checkpoints" / name).mkdir(parents=True)
    script = stage.clone / "scripts" / "launch" / "tpu_worker.sh"
    assert stage.run("bash", script, "step", f"--workdir={stage.folder}/run").stdout == "10\n"
    assert stage.run("bash", script, "step", f"--workdir={stage.folder}/none").stdout == "-1\n"
