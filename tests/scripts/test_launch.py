"""What all launchers share: help, mistakes, settings from the environment, dry runs; run against `launch_stage`."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .launch_stage import (
    ARGUMENTS,
    LAUNCHERS,
    NAMES,
    ROOT,
    TPU,
    same_words,
)


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
    "no flag": ("gpu", ["train", "--xla=off", *TRAIN_HERE], "--xla=off: off is no flag"),
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
    assert {Path(words[0]).name for words in printed} <= {*NAMES, "git", "mkdir", "rmdir", "touch", "export"}
