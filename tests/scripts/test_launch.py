"""The launchers, run for real against stand-ins that record how they were called and exit as they are told.

Nothing here reaches a cloud: gcloud, sbatch, srun and the rest are one recording program under many names. git, ssh's
splitting of words and the shell of a worker are real.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("tpu_vm", "slurm", "gpu")
NAMES = ("gcloud", "sbatch", "srun", "scontrol", "squeue", "sleep", "tmux", "make", "uv", "sudo", "gcsfuse", "python")

# Appends [name, argument, ...] to `record`, then answers with the first rule whose pattern is found in the command.
# A rule is [pattern, [answer, ...]]; its last answer is given again and again. An answer may print, make a checkpoint,
# wait until another command has been recorded or a signal has come, and exit with a code.
STAND_IN = """#!{python} -IS
import json, os, re, signal, sys, time
folder = {folder!r}
got = []
signal.signal(signal.SIGTERM, lambda number, frame: got.append("SIGTERM"))
signal.signal(signal.SIGINT, lambda number, frame: got.append("SIGINT"))
command = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
ids = os.environ.get("JAX_LOCAL_DEVICE_IDS")
with open(folder + "/record", "a") as record:
    record.write(json.dumps([*command, *(["ids=" + ids] if ids else [])]) + chr(10))
rules = json.load(open(folder + "/rules"))
answer = {{}}
for pattern, answers in rules:
    if re.search(pattern, " ".join(command)):
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        break
json.dump(rules, open(folder + "/rules", "w"))
if answer.get("checkpoint"):
    os.makedirs(answer["checkpoint"], exist_ok=True)
deadline = time.monotonic() + 20
while "until" in answer and answer["until"] not in got and answer["until"] not in open(folder + "/record").read():
    time.sleep(0.02)
    assert time.monotonic() < deadline
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("err", ""))
sys.exit(answer.get("code", 0))
"""

STATES = ("ACTIVE", "READY", "SUSPENDED", "WAITING_FOR_RESOURCES")
ACTIVE, READY, LOST, WAITING = ({"out": f"{state}\n"} for state in STATES)
MISSING = {"code": 1, "err": "ERROR: (gcloud) NOT_FOUND: Resource not found\n"}
REQUEST, NODE = r"queued-resources describe", r"tpu-vm describe"
TRAIN, STEP, SETUP = r"tpu_worker.sh train", r"tpu_worker.sh step", r"tpu_worker.sh install"
ARGUMENTS = ["--config=configs/scenes/dalle.py:debug", "--workdir=/mnt/tessera/run", '--config.x=it\'s "a  b" $HOME;']
TPU = ["--name=slice", "--zone=us-east5-b", "--accelerator_type=v6e-16", "--bucket=gs://my-runs", "--spot"]


class Stage:
    """A clone of the launchers in a folder whose name has a space, and stand-ins for every program they call."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.clone = folder / "a clone"
        shutil.copytree(ROOT / "scripts" / "launch", self.clone / "scripts" / "launch")
        shutil.copy(ROOT / ".gitignore", self.clone)
        for name in NAMES:
            self.stand_in(folder / "bin" / name)
        self.stand_in(self.clone / ".venv" / "bin" / "python")
        self.rules()

    def stand_in(self, path: Path) -> None:
        """Puts the recording program at a path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN.format(python=sys.executable, folder=str(self.folder)))
        path.chmod(0o755)

    def git(self, *arguments: str) -> str:
        """Runs git in the clone."""
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=self.clone, capture_output=True, text=True, check=True).stdout.strip()

    def rules(self, *rules: tuple[str, Sequence[dict[str, Any]]]) -> None:
        """Sets how stand-ins answer; what no rule matches prints nothing and succeeds."""
        usual = [(r"buckets describe", [{"out": "True\n"}]), (NODE, [READY]), (STEP, [{"out": "-1\n"}])]
        (self.folder / "rules").write_text(json.dumps([*rules, (REQUEST, [MISSING, ACTIVE]), *usual]))

    def record(self) -> list[list[str]]:
        """The commands that were called, but for sleeps."""
        path = self.folder / "record"
        lines = path.read_text().splitlines() if path.exists() else []
        return [command for command in map(json.loads, lines) if command[0] != "sleep"]

    def forget(self) -> None:
        """Empties the record."""
        (self.folder / "record").unlink(missing_ok=True)

    def calls(self, pattern: str) -> list[list[str]]:
        """Those of the recorded commands in which a pattern is found."""
        return [command for command in self.record() if re.search(pattern, " ".join(command))]

    def start(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Starts a command, with the stand-ins first on PATH."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TESSERA_", "SLURM_"))}
        clean |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder), **environment}
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str | Path, **keywords: Any) -> subprocess.CompletedProcess[str]:
        """Starts a command and waits for its end."""
        process = self.start(*command, **keywords)
        out, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    def launch(self, name: str, *arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
        """Runs a launcher of the clone."""
        return self.run("bash", self.clone / "scripts" / "launch" / f"{name}.sh", *arguments, **keywords)

    def train_on_tpu(self, *rules: tuple[str, Sequence[dict[str, Any]]]) -> subprocess.CompletedProcess[str]:
        """`tpu_vm.sh run` with these answers."""
        self.rules(*rules)
        return self.launch("tpu_vm", "run", *TPU, "--settle=60", "--", *ARGUMENTS)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def clone(stage: Stage) -> Stage:
    """A stage whose clone is a git repository with everything committed."""
    stage.git("init", "--quiet")
    stage.git("add", "--all")
    stage.git("commit", "--quiet", "--message=x")
    return stage


def until(condition: Callable[[], object]) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def verbs(stage: Stage) -> list[str]:
    """What a TPU run did, in short; looks at states left out."""
    names = {
        "queued-resources create": "create",
        "scp": "copy",
        SETUP: "setup",
        TRAIN: "train",
        r"tpu_worker.sh stop": "stop",
        "queued-resources delete": "delete",
    }
    commands = [" ".join(command) for command in stage.record()]
    found = [[short for pattern, short in names.items() if re.search(pattern, command)] for command in commands]
    return [short for shorts in found for short in shorts]


BEGIN = ["create", "copy", "setup"]


def same_words(commands: Sequence[Sequence[str]]) -> list[list[str]]:
    """Commands without the number that tells attempts apart."""
    return [[re.sub(r"--attempt=[0-9-]+", "--attempt=N", word) for word in command] for command in commands]


def test_shellcheck_finds_nothing():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts" / "launch").glob("*.sh"))
    assert {Path(name).stem for name in scripts} > set(LAUNCHERS)
    command = [str(Path(sys.executable).parent / "shellcheck"), "--external-sources", *scripts]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_says_how_to_call_it(name, stage):
    result = stage.launch(name, "--help")
    assert result.returncode == 0 and f"usage: scripts/launch/{name}.sh" in result.stdout
    assert stage.record() == []


TRAIN_TPU = ["--", "--config=c.py", "--workdir=/mnt/tessera/run"]
TRAIN_HERE = ["--", "--config=c.py", "--workdir=runs/x"]
MISTAKES = {
    "no command": ("tpu_vm", [], "say what to do"),
    "unknown command": ("gpu", ["trian"], "unknown command trian"),
    "unknown setting": ("tpu_vm", ["run", "--nmae=x"], "unknown setting --nmae"),
    "setting without value": ("tpu_vm", ["run", "--name"], "--name needs a value"),
    "train's argument before --": ("gpu", ["train", "--config=c.py"], "unknown setting --config"),
    "no name": ("tpu_vm", ["delete", "--zone=z"], "--name is missing; give --name=VALUE or set TESSERA_NAME"),
    "no zone": ("tpu_vm", ["status", "--name=x"], "--zone is missing"),
    "no type": ("tpu_vm", ["run", "--name=x", "--zone=z"], "--accelerator_type is missing"),
    "unknown type": ("tpu_vm", ["create", "--name=x", "--zone=z", "--accelerator_type=v9-8"], "--runtime_version"),
    "no storage": ("tpu_vm", ["setup", "--name=x", "--zone=z"], "--bucket is missing"),
    "not a number": ("tpu_vm", ["run", "--name=x", "--zone=z", "--pause=soon"], "must be a whole number"),
    "no training": ("tpu_vm", ["train", "--name=x", "--zone=z"], "-- --config=FILE"),
    "workdir on a worker": ("tpu_vm", ["train", "--name=x", "--zone=z", *TRAIN_HERE], "below /mnt/tessera"),
    "workdir in a bucket": (
        "tpu_vm",
        ["train", "--name=x", "--zone=z", "--", "--config=c.py", "--workdir=gs://b/x"],
        "through the mount",
    ),
    "uncommitted": ("tpu_vm", ["run", *TPU, *TRAIN_TPU], "uncommitted changes"),
    "no such commit": ("tpu_vm", ["setup", *TPU, "--commit=v99"], "no such --commit"),
    "no GPUs": ("slurm", ["submit", *TRAIN_HERE], "--gpus_per_node is missing"),
    "no workdir": ("slurm", ["submit", "--gpus_per_node=1", "--", "--config=c.py"], "--workdir is missing"),
    "a job outside of jobs": ("slurm", ["job", "--gpus_per_node=1", *TRAIN_HERE], "runs inside a job"),
    "unknown detachment": ("gpu", ["train", "--detach=screen", *TRAIN_HERE], "neither tmux nor nohup"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(name, clone):
    launcher, arguments, message = MISTAKES[name]
    (clone.clone / "uncommitted").touch()
    result = clone.launch(launcher, *arguments)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert clone.record() == []


def test_settings_come_from_the_environment_too(stage):
    result = stage.launch("tpu_vm", "delete", "--zone=z", TESSERA_NAME="from the environment", TESSERA_PROJECT="p")
    assert result.returncode == 0, result.stderr
    command = ["gcloud", "compute", "tpus", "queued-resources", "delete", "from the environment", "--force", "--quiet"]
    assert stage.record() == [[*command, "--zone=z", "--project=p"]]


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
    train = f"{worker} train --attempt=N -- {shlex.join(ARGUMENTS[:2])} '--config.x=it'\\''s \"a  b\" $HOME;'"
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


@pytest.mark.parametrize("name", LAUNCHERS)
def test_dry_run_prints_what_a_run_executes_and_executes_nothing(name, clone):
    command = {
        "tpu_vm": ["run", *TPU],
        "slurm": ["submit", "--gpus_per_node=2", "--name=a name"],
        "gpu": ["run"],
    }[name]
    dry = clone.launch(name, *command, "--dry_run", "--", *ARGUMENTS)
    assert dry.returncode == 0, dry.stderr
    assert clone.record() == []
    assert not (clone.clone / ".venv-incomplete").exists()
    real = clone.launch(name, *command, "--", *ARGUMENTS)
    assert real.returncode == 0, real.stderr
    printed = [shlex.split(line) for line in dry.stdout.splitlines()]
    stood_in = [[Path(words[0]).name, *words[1:]] for words in printed if Path(words[0]).name in NAMES]
    assert same_words(stood_in) == same_words(clone.record())
    assert {Path(words[0]).name for words in printed} <= {*NAMES, "git", "mkdir", "rmdir", "touch"}


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
