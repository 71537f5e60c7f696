"""The commands as a user types them: help, and one clear line with exit code 2 for a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.entry_point import run as run_command

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    *("train", "sample", "evaluation", "scripts.prepare", "scripts.describe", "scripts.demo"),
    *("scripts.fit", "scripts.benchmark", "scripts.chaos", "scripts.convert", "scripts.precompute"),
)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TESSERA_ALLOCATOR": "default"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = call(command, "--help")
    assert result.returncode == 0 and f"usage: python -m {command}" in result.stdout


DVAE = "--config=configs/scenes/dvae.py:debug"
MISTAKES = {
    "unknown config key": (["train", DVAE, "--config.stpes=3", "--workdir={tmp}/run"], "did you mean steps"),
    "wrong type": (["train", DVAE, "--config.steps=many", "--workdir={tmp}/run"], "must be a whole number"),
    "missing config": (["train", "--config=configs/none.py", "--workdir={tmp}/run"], "no config file configs/none.py"),
    "missing workdir": (["train", DVAE], "--workdir"),
    "nothing to trace": (["train", DVAE, "--workdir={tmp}/run", "--profile=0"], "--profile must be at least 1, not 0"),
    "missing dataset": (["train", DVAE, "--config.data.data_dir={tmp}", "--workdir={tmp}/run"], "scripts.prepare"),
    "unwritable workdir": (["train", DVAE, "--workdir=/proc/nowhere/run"], "cannot write the workdir"),
    "missing frozen stage": (
        ["train", "--config=configs/scenes/dalle.py", "--config.frozen.dvae.source={tmp}/no", "--workdir={tmp}/run"],
        "is missing",
    ),
    "missing run": (["sample", "--run={tmp}/no", "--prompt=a red circle"], "does not exist"),
    "missing run to evaluate": (["evaluation", "--run={tmp}"], "is not a run folder"),
    "empty prompt": (["sample", "--run={tmp}/no", "--prompt= "], "the prompt is empty"),
    "missing prompt file": (["sample", "--run={tmp}/no", "--prompt=@{tmp}/none.txt"], "no prompt file"),
    "no run to sample": (["sample", "--run={tmp}/no"], "no does not exist"),
    "no pictures": (["sample", "--run={tmp}/no", "--prompt=x", "--num=0"], "--num must be at least 1"),
    "demo that cannot write": (["scripts.demo", "--workdir=/proc/nowhere"], "cannot write /proc/nowhere/report.html"),
    "demo with too many captions": (["scripts.demo", "--num=9999"], "--num must be between"),
    "unknown dataset": (["scripts.prepare", "--dataset=no_such_data"], "unknown dataset 'no_such_data'"),
    "nothing to convert": (
        ["scripts.convert", "--source=openai", "--input={tmp}/none.pt", "--output={tmp}/out"],
        "there is no folder or file",
    ),
    "unknown flag": (["evaluation", "--rum=x", "--run=y"], "--rum"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(name, tmp_path):
    arguments, message = MISTAKES[name]
    result = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.mark.parametrize("command", ["train", "sample", "evaluation"])
def test_a_command_can_set_its_allocator_before_jax_is_imported(command):
    program = f"import sys, {command}.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def test_main_functions_end_through_the_same_door():
    for command in COMMANDS:
        path = ROOT / command.replace(".", "/")
        source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        assert f"entry_point.{run_command.__name__}(main)" in source
