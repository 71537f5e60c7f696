"""Stand-ins for gcloud, sbatch, srun and the rest: one recording program under many names, which exits as it is told.

Nothing here reaches a cloud. git, ssh's splitting of words and the shell of a worker are real.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("tpu_vm", "slurm", "gpu")
NAMES = ("gcloud", "sbatch", "srun", "scontrol", "squeue", "sleep", "tmux", "make", "uv", "sudo", "gcsfuse", "python")

# Appends [name, argument, ...] to `record` and [name, {variable: flags of the compiler}] to `flags`, then answers with
# the first rule whose pattern is found in the command. A rule is [pattern, [answer, ...]]; its last answer is given
# again and again. An answer may print, make a checkpoint, wait until another command has been recorded or a signal has
# come, and exit with a code. With the stage it ends.
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
flags = {{name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if name in os.environ}}
with open(folder + "/flags", "a") as record:
    record.write(json.dumps([command[0], flags]) + chr(10))
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
    assert time.monotonic() < deadline and not os.path.exists(folder + "/over")
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

    def __init__(self, folder: Path, start_process: Callable[..., subprocess.Popen[str]]):
        self.folder = folder
        self._start_process = start_process
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

    def end(self) -> None:
        """Ends the stand-ins that still wait, as after a failed test, whoever started them."""
        (self.folder / "over").touch()

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

    def flags(self, name: str) -> list[dict[str, str]]:
        """The variables with flags of the compiler that a program was started with, each time."""
        starts = map(json.loads, (self.folder / "flags").read_text().splitlines())
        return [flags for program, flags in starts if program == name]

    def forget(self) -> None:
        """Empties the record."""
        (self.folder / "record").unlink(missing_ok=True)
        (self.folder / "flags").unlink(missing_ok=True)

    def calls(self, pattern: str) -> list[list[str]]:
        """Those of the recorded commands in which a pattern is found."""
        return [command for command in self.record() if re.search(pattern, " ".join(command))]

    def start(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Starts a command, with the stand-ins first on PATH."""
        own = ("TESSERA_", "SLURM_", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        clean |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder), **environment}
        return self._start_process(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
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
