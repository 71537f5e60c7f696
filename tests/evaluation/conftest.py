"""Three real (tiny) runs, opened once for all that evaluates them."""

import pytest

from sample.trained import TrainedSampler


@pytest.fixture(scope="session")
def stage1(debug_run):
    """An image tokenizer."""
    return TrainedSampler.open(debug_run("scenes/dvae.py"), chunk=16)


@pytest.fixture(scope="session")
def stage2(debug_run):
    """A transformer that draws captions."""
    return TrainedSampler.open(debug_run("scenes/dalle.py"), chunk=16)


@pytest.fixture(scope="session")
def clip_run(debug_run):
    """A CLIP."""
    return TrainedSampler.open(debug_run("scenes/clip.py"), chunk=32)
