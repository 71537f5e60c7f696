"""The fast allocator: a command executes itself once more, and nobody but malloc notices."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli import allocator

ROOT = Path(__file__).resolve().parents[2]

# A command that tells in which state it runs. `executions` counts how often its main module began.
COMMAND = """
import json, os, sys
with open(os.environ["COUNTER"], "a") as counter:
    counter.write("x")
{before}
from cli.allocator import reexec_with_fast_allocator
reexec_with_fast_allocator()
reexec_with_fast_allocator()
if __name__ == "__main__":
    started_with = open("/proc/self/environ").read().split(chr(0))  # glibc cuts its tunables apart in place
    print(json.dumps({{
        "executions": len(open(os.environ["COUNTER"]).read()),
        "pid": os.getpid(),
        "arguments": sys.argv[1:],
        "flags": [sys.flags.dont_write_bytecode, sys.flags.utf8_mode],
        "prefix": sys.prefix,
        "tunables": [line.removeprefix("GLIBC_TUNABLES=") for line in started_with if "glibc." in line],
        "environment": {{key: value for key, value in os.environ.items() if "GLIBC" in key or "MALLOC" in key}},
        "stdin": sys.stdin.read(),
    }}))
    {after}
"""


@pytest.fixture
def start(tmp_path: Path, start_process):
    """Starts the command, saved as a package `probe`."""

    def start(before: str = "", after: str = "", python=(), command=("-m", "probe"), arguments=(), **environment: str):
        (tmp_path / "probe").mkdir()
        (tmp_path / "probe" / "__main__.py").write_text(COMMAND.format(before=before, after=after), encoding="utf-8")
        clean = {key: value for key, value in os.environ.items() if "GLIBC" not in key and "MALLOC" not in key}
        return start_process(
            [sys.executable, *python, *command, *arguments],
            cwd=tmp_path,
            env={
                **clean,
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "COUNTER": str(tmp_path / "counter"),
                allocator.SWITCH: "",
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture
def run(start):
    """Runs the command to its end and returns (what it printed, its exit code)."""

    def run(stdin: str = "", **options):
        process = start(**options)
        stdout, stderr = process.communicate(stdin, timeout=60)
        assert not stderr, stderr
        return json.loads(stdout), process

    return run


def test_command_is_executed_again_with_the_same_arguments_process_and_streams(run):
    arguments = ("--config=a b.py:debug", "", "--config.steps=3", "é")
    said, process = run(stdin="hello", python=("-B", "-X", "utf8"), arguments=arguments)
    assert said["executions"] == 2
    assert said["pid"] == process.pid
    assert said["arguments"] == list(arguments)
    assert said["flags"] == [1, 1]
    assert said["prefix"] == sys.prefix
    assert said["stdin"] == "hello"
    assert "glibc.malloc.hugetlb=1" in said["tunables"]
    assert said["environment"] == {}  # a child process starts with malloc as it was


def test_signals_and_exit_code_pass_through(start):
    process = start(
        after="import signal, time; signal.signal(15, lambda *_: sys.exit(75)); print(flush=True); time.sleep(60)",
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    assert json.loads(process.stdout.readline())["executions"] == 2
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


@pytest.mark.parametrize(
    ("before", "environment"),
    [
        ("", {"TESSERA_ALLOCATOR": "default"}),
        ("", {"JAX_PLATFORMS": "cuda"}),
        ("", {"JAX_PLATFORMS": "tpu,cpu"}),
        ("import types; sys.modules['jax'] = types.ModuleType('jax')", {}),
        ("sys.platform = 'darwin'; del os.confstr", {}),
        ("os.confstr = lambda name: 'glibc 2.34'", {}),
        ("sys.settrace(lambda *_: None)", {}),
        ("del __file__", {}),
        ("import cli.accelerators; cli.accelerators.DEVICES = ('/dev/nul?',)", {"JAX_PLATFORMS": ""}),
    ],
)
def test_command_runs_once_where_the_allocator_does_not_apply(run, before: str, environment: dict):
    said, _ = run(before=before, **environment)
    assert said["executions"] == 1
    assert said["tunables"] == []


def test_machine_without_an_accelerator_needs_no_variable(run):
    before = "import cli.accelerators; cli.accelerators.DEVICES = ('/dev/no-such-device[0-9]*',)"
    said, _ = run(before=before, JAX_PLATFORMS="")
    assert said["executions"] == 2


def test_spawned_worker_is_left_alone(start, tmp_path: Path):
    after = "import multiprocessing as m; p = m.get_context('spawn').Process(target=print); p.start(); p.join()"
    process = start(after=after + "; sys.exit(p.exitcode)", command=("probe/__main__.py",))
    stdout, stderr = process.communicate("", timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert (tmp_path / "counter").read_text() == "xxx"  # the command twice, the worker once


def test_values_of_the_user_stay(run):
    said, _ = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0", MALLOC_ARENA_MAX="4")
    assert said["executions"] == 2
    assert said["tunables"][0] == "glibc.malloc.hugetlb=0"
    assert not any("hugetlb=1" in tunable or "arena_max" in tunable for tunable in said["tunables"])
    assert said["environment"] == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "MALLOC_ARENA_MAX": "4"}


def test_interpreter_that_is_gone_does_not_stop_the_command(run):
    said, _ = run(before="sys.executable = '/nonexistent/python'")
    assert said["executions"] == 1
