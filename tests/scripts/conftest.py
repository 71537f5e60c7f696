"""The stage that launchers run on."""

from pathlib import Path

import pytest

from .launch_stage import Stage


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
