"""Compiled programs outlive a command, in a folder that only machines alike share."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import compilation_cache as cache

ROOT = Path(__file__).resolve().parents[2]

# A command whose main function compiles one program and prints its result, bit by bit.
COMMAND = """
from cli import entry_point

def main(arguments):
    import jax, jax.numpy as jnp, numpy as np
    program = jax.jit(jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.sin(w) @ w) ** 2)), donate_argnums=0)
    print(np.asarray(program(jax.random.normal(jax.random.key(0), (64, 64)))).tobytes().hex())

entry_point.run(main)
"""

CPUINFO = "processor : 0\nmodel : 207\nflags : fpu sse avx\ncpu MHz : 2300\n\nprocessor : 1\nflags : none\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, nothing set, and jax not yet imported."""
    for name in (cache.SWITCH, cache.FOLDER, cache.SIZE):
        monkeypatch.setenv(name, "")  # so that the value from before is put back
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    return tmp_path


def test_the_folder_is_the_users_own_bounded_and_named_after_the_machine(home, monkeypatch):
    cache.keep_compiled_programs()
    folder = Path(os.environ[cache.FOLDER])
    assert folder == home / ".cache" / "tessera" / "xla" / cache.machine()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert int(os.environ[cache.SIZE]) == 10 * 2**30

    monkeypatch.delenv(cache.FOLDER)
    monkeypatch.setenv(cache.SIZE, "1000")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    cache.keep_compiled_programs()
    assert Path(os.environ[cache.FOLDER]).is_relative_to(home / "elsewhere")
    assert os.environ[cache.SIZE] == "1000"


@pytest.mark.parametrize(
    "settings",
    [
        {cache.SWITCH: "off"},
        {cache.FOLDER: "/the/users/own"},
        {cache.FOLDER: ""},
        {"HOME": "/proc/nowhere"},
        {"XDG_CACHE_HOME": "/proc/nowhere"},
        {"HOME": "/dev/null"},
    ],
)
def test_the_environment_stays_where_the_user_chose_or_nothing_can_be_written(home, monkeypatch, capfd, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    cache.keep_compiled_programs()
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")


def test_nothing_is_set_without_a_home_or_after_jax_was_imported(home, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as context:
        context.setattr(Path, "expanduser", no_home)
        cache.keep_compiled_programs()
    assert cache.FOLDER not in os.environ
    monkeypatch.setitem(sys.modules, "jax", os)
    cache.keep_compiled_programs()
    assert cache.FOLDER not in os.environ


def test_machines_that_run_other_code_get_other_folders(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"

    def machine(text: str) -> str:
        cpuinfo.write_text(text)
        return cache.machine(cpuinfo)

    name = machine(CPUINFO)
    assert machine(CPUINFO.replace("2300", "1200")) == name
    assert machine(CPUINFO.replace("avx", "avx2")) != name
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(99), raising=False)
    assert machine(CPUINFO) != name
    cpuinfo.unlink()
    alone = cache.machine(cpuinfo)
    monkeypatch.setattr(cache.platform, "node", lambda: "another")
    assert cache.machine(cpuinfo) != alone


def test_an_entry_that_a_killed_command_left_half_written_is_removed(home):
    cache.keep_compiled_programs()
    folder = Path(os.environ.pop(cache.FOLDER))
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (folder / name).write_bytes(b"x")
    with open(folder / ".lockfile") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another command is writing
        cache.keep_compiled_programs()
        assert (folder / "torn-cache").exists() and os.environ.pop(cache.FOLDER)
    cache.keep_compiled_programs()
    assert sorted(path.name for path in folder.glob("*-*")) == ["whole-atime", "whole-cache"]


def test_a_second_command_takes_the_compiled_program_and_gets_the_same_bits(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in (cache.FOLDER, cache.SWITCH)}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def call() -> str:
        command = [sys.executable, "-W", "error", "-c", COMMAND]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0 and not result.stderr, result.stderr
        return result.stdout

    def times() -> dict[str, int]:
        """When each entry was last used; JAX writes it at a hit."""
        return {path.name: int.from_bytes(path.read_bytes(), "little") for path in tmp_path.rglob("*-atime")}

    first, made = call(), times()
    second, used = call(), times()
    assert made and made.keys() == used.keys()
    assert all(used[name] > made[name] for name in made)
    assert second == first and len(first) == 2 * 4 * 64 * 64 + 1
