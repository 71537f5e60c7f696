"""The stage that launchers run on."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .launch_stage import Stage


@pytest.fixture
def stage(tmp_path: Path, start_process: Callable[..., subprocess.Popen[str]]) -> Iterator[Stage]:
    stage = Stage(tmp_path, start_process)
    yield stage
    stage.end()


@pytest.fixture
def clone(stage: Stage) -> Stage:
    """A stage whose clone is a git repository with everything committed."""
    stage.git("init", "--quiet")
    stage.git("add", "--all")
    stage.git("commit", "--quiet", "--message=x")
    return stage
