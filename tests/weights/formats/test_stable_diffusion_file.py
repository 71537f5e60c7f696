"""Stable Diffusion in one file, as its authors keep it, and what is refused of such files."""

import re

import numpy as np
import pytest

from cli.errors import UserError
from scripts.convert import main as convert
from weights.files.tensors import write_tensors
from weights.run import Run

from ..stable_diffusion_samples import single_file


@pytest.fixture(scope="module")
def authors():
    """{name: tensor} of one file as its authors have it."""
    return single_file()


@pytest.fixture
def convert_file(authors, tmp_path):
    """Converts the authors' file without the tensors of some names, and with others."""

    def change_and_convert(*flags, without=(), **more):
        kept = {name: tensor for name, tensor in authors.items() if not name.startswith(tuple(without))}
        write_tensors(tmp_path / "sd-v1.safetensors", kept | more)
        convert([f"--input={tmp_path}/sd-v1.safetensors", f"--output={tmp_path}/ours", *flags])
        return Run.open(tmp_path / "ours")

    return change_and_convert


BLOCKS = "model.diffusion_model.input_blocks"
NOTHING = np.zeros((1, 1, 1, 1), np.float32)


def test_one_file_comes_in(convert_file):
    run = convert_file("--image_size=16")
    assert set(run.models()) == {"denoiser", "first_stage", "text"} and run.config.sample.steps == 50


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{BLOCKS}.0.0.op.weight", "resamples at .0, 2., which no UNet of ours has"),
        (f"{BLOCKS}.400000000.0.x", "has 5 input_blocks and"),
        (f"{BLOCKS}.{'9' * 5000}.0.x", "unexpected|are not"),
    ],
    ids=["one that is the first", "very high", "too long a number"],
)
def test_blocks_that_no_unet_has_are_a_line(name, message, convert_file):
    with pytest.raises(UserError, match=message):
        convert_file(**{name: NOTHING})


def test_a_file_of_which_the_first_stage_alone_is_known(convert_file):
    """Such as SDXL's, or one of classes."""
    changes = {"without": ["cond_stage_model."], "conditioner.embedders.0.x": NOTHING}
    with pytest.raises(UserError, match="without a text encoder that is known, .*; give --only=first_stage for"):
        convert_file(**changes)
    assert set(convert_file("--only=first_stage", **changes).models()) == {"autoencoder"}


def test_a_file_whose_unet_sees_more_than_latents_is_refused(convert_file, authors):
    name = f"{BLOCKS}.0.0.weight"
    with pytest.raises(UserError, match="UNet reads 9 channels and its first stage makes 4: pipelines"):
        convert_file(**{name: np.zeros((authors[name].shape[0], 9, 3, 3), np.float32)})


@pytest.mark.parametrize("option", ["prediction=v", "image_size=512", "tokenizer=merges.txt"])
def test_options_that_a_first_stage_does_not_read_are_refused(option, convert_file):
    with pytest.raises(UserError, match=f"--{option.partition('=')[0]} says nothing of a first stage; leave it out"):
        convert_file("--only=first_stage", f"--{option}")


def refuse_file(folder, authors, seed):
    """Whether one file with a fault of a seed is refused, in one line."""
    rng = np.random.default_rng(seed)
    tensors, name = dict(authors), sorted(authors)[rng.integers(len(authors))]
    array = tensors.pop(name)
    wild = str((7, 65, 10**8, 10**30)[rng.integers(4)])
    tensors |= (
        *({}, {f"{name}_": array}, {name: np.zeros((*array.shape, 1), np.float32)}, {name: array * np.nan}),
        *({name: array[:0]}, {re.sub(r"\d+", wild, name, count=1) + ("" if re.search(r"\d", name) else "_"): array}),
    )[rng.integers(6)]
    path = folder / "sd-v1.safetensors"
    write_tensors(path, tensors)
    if rng.integers(6) == 0:
        path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size - 1)])
    try:
        convert([f"--input={path}", f"--output={folder}/ours", "--image_size=16"])
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
        assert not (folder / "ours").exists()
        return True
    return False


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 108), marks=pytest.mark.slow)], ids=["few", "many"])
def test_faults_of_one_file_end_in_a_line(seeds, authors, tmp_path):
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert refuse_file(folder, authors, seed), seed
