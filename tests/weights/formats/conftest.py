"""A tiny pipeline of Stable Diffusion in both forms, for the tests of its formats and of what is drawn with it."""

import pytest

from scripts.convert import main as convert

from ..stable_diffusion_samples import write_pipeline


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """(folder, {part: parameters}) as diffusers keeps it; tests change copies."""
    folder = tmp_path_factory.mktemp("pipeline") / "theirs"
    return folder, write_pipeline(folder)


@pytest.fixture(scope="session")
def ours(theirs):
    """The folder that it was converted into."""
    folder = theirs[0].parent / "ours"
    convert([f"--input={theirs[0]}", f"--output={folder}"])
    return folder
