"""The compiler's flags that launchers give a training: which ones, in what order, and that compilers know them."""

import os
import shlex
import subprocess
import sys

import pytest

from .launch_stage import ROOT, Stage
from .test_launch_slurm import run_job, submitted

HERE = ["--config=c.py", "--workdir=runs/x"]
SCRIPTS = ROOT / "scripts" / "launch"


def usual(name: str) -> str:
    """GPU_FLAGS or TPU_FLAGS, as one line."""
    script = f'source "$0/command.sh" && source "$0/xla_flags.sh" && echo "${{{name}[@]}}"'
    result = subprocess.run(["bash", "-c", script, str(SCRIPTS)], capture_output=True, text=True, check=True)
    return result.stdout.strip()


# What is given: (--xla, variable of the user's own) -> what training sees.
ORDER = [
    ("", "", "{usual}"),
    ("--xla_b=2  --xla_c", "--xla_a=1\n--xla_b=1", "{usual} --xla_a=1 --xla_b=1 --xla_b=2 --xla_c"),
    ("none", "--xla_a=1", "--xla_a=1"),
    ("none --xla_b=2", "--xla_a=1", "--xla_a=1 --xla_b=2"),
]


@pytest.mark.parametrize(("setting", "own", "expected"), ORDER)
def test_gpu_gives_the_usual_flags_then_the_users_own_then_those_of_the_command(setting, own, expected, stage):
    assert stage.launch("gpu", "train", f"--xla={setting}", "--", *HERE, XLA_FLAGS=own).returncode == 0
    assert stage.flags("python") == [{"XLA_FLAGS": expected.format(usual=usual("GPU_FLAGS"))}]


def test_gpu_gives_none_if_there_are_none(stage):
    assert stage.launch("gpu", "train", "--", *HERE, TESSERA_XLA="none").returncode == 0
    assert stage.flags("python") == [{}]


@pytest.mark.parametrize("how", ["tmux", "nohup"])
def test_gpu_keeps_the_setting_when_it_detaches(how, stage):
    result = stage.launch("gpu", "train", f"--detach={how}", "--dry_run", "--xla=none --xla_a=1", "--", *HERE)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(how)]
    assert "--xla=none --xla_a=1" in shlex.split(line)


@pytest.mark.parametrize(("gpus", "expected"), [(1, "{usual} --xla_a=1"), (0, "--xla_a=1")])
def test_a_slurm_job_gives_the_flags_to_its_tasks(gpus, expected, stage):
    run_job(stage, submitted(stage, f"--gpus_per_node={gpus}", "--xla=--xla_a=1"))
    assert stage.flags("srun") == [{"XLA_FLAGS": expected.format(usual=usual("GPU_FLAGS"))}]


@pytest.mark.parametrize(("setting", "own", "expected"), ORDER)
def test_a_tpu_worker_gives_them_to_libtpu(setting, own, expected, clone: Stage):
    (clone.folder / "tessera").symlink_to(clone.clone)
    train = ["train", "--name=slice", "--zone=z", f"--xla={setting}", "--", "--config=c.py", "--workdir=/mnt/tessera/x"]
    assert clone.launch("tpu_vm", *train).returncode == 0
    ((*_, command, _, _),) = clone.calls("tpu_worker.sh train")
    clone.forget()
    assert clone.run("bash", "-c", command.removeprefix("--command="), LIBTPU_INIT_ARGS=own).returncode == 0
    assert clone.flags("python") == [{"LIBTPU_INIT_ARGS": expected.format(usual=usual("TPU_FLAGS"))}]


def test_a_dry_run_says_which_flags_there_are(stage):
    result = stage.launch("gpu", "train", "--dry_run", "--", *HERE)
    assert shlex.split(result.stdout.splitlines()[0]) == ["export", f"XLA_FLAGS={usual('GPU_FLAGS')}"]


# Compilers end the process at an unknown flag, so a later version of one may break a launcher.


def start(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_the_installed_jaxlib_knows_the_flags_for_gpus():
    code = "import jax; print(jax.devices())"
    known = start(code, XLA_FLAGS=usual("GPU_FLAGS"))
    assert known.returncode == 0, known.stderr
    assert "Unknown flag" in start(code, XLA_FLAGS=f"{usual('GPU_FLAGS')} --xla_gpu_no_such=true").stderr


@pytest.mark.slow
def test_the_installed_libtpu_knows_the_flags_for_tpus():
    code = "from jax.experimental.topologies import get_topology_desc as get; print(get('v5e:2x2', 'tpu').devices)"
    known = start(code, LIBTPU_INIT_ARGS=usual("TPU_FLAGS"))
    assert known.returncode == 0, known.stderr
    unknown = start(code, LIBTPU_INIT_ARGS=f"{usual('TPU_FLAGS')} --xla_tpu_no_such=true")
    assert unknown.returncode != 0 and "xla_tpu_no_such" in unknown.stderr
