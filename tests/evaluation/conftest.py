"""Three real (tiny) runs, trained once for all that evaluates them."""

import pytest

from cli.config import load_config
from sample.trained import TrainedSampler
from train.loop import train


@pytest.fixture(scope="session")
def stage1(scenes_dir, tmp_path_factory):
    """An image tokenizer."""
    config = load_config(["--config=configs/scenes/dvae.py:debug", f"--config.data.data_dir={scenes_dir}"])
    workdir = tmp_path_factory.mktemp("runs") / "dvae"
    train(config, workdir)
    return TrainedSampler.open(workdir, chunk=16)


@pytest.fixture(scope="session")
def stage2(scenes_dir, tmp_path_factory):
    """A transformer that draws captions."""
    config = load_config(["--config=configs/scenes/dalle.py:debug", f"--config.data.data_dir={scenes_dir}"])
    workdir = tmp_path_factory.mktemp("runs") / "dalle"
    train(config, workdir)
    return TrainedSampler.open(workdir, chunk=16)


@pytest.fixture(scope="session")
def clip_run(scenes_dir, tmp_path_factory):
    """A CLIP."""
    config = load_config(["--config=configs/scenes/clip.py:debug", f"--config.data.data_dir={scenes_dir}"])
    workdir = tmp_path_factory.mktemp("runs") / "clip"
    train(config, workdir)
    return TrainedSampler.open(workdir, chunk=32)
