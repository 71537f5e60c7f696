"""Faults of every kind in a pipeline of Stable Diffusion: each ends in one line, and nothing is written."""

import json
import shutil

import numpy as np
import pytest

from cli.errors import UserError
from scripts.convert import main as convert
from weights.files.tensors import read_tensors, write_tensors

from ..stable_diffusion_samples import WEIGHTS


def without_a_file(folder, rng):
    files = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
    files += ["tokenizer/merges.txt", *(f"{part}/{name}" for part, name in WEIGHTS.items())]
    (folder / files[rng.integers(len(files))]).unlink()


def with_other_tensors(folder, rng):
    part = sorted(WEIGHTS)[rng.integers(3)]
    tensors = dict(read_tensors(folder / part / WEIGHTS[part]))
    name = sorted(tensors)[rng.integers(len(tensors))]
    array = tensors.pop(name)
    kind = rng.integers(4)
    tensors |= ({}, {f"{name}_": array}, {name: np.zeros((*array.shape, 1), np.float32)}, {name: array * np.nan})[kind]
    write_tensors(folder / part / WEIGHTS[part], tensors)


def with_damaged_bytes(folder, rng):
    part = sorted(WEIGHTS)[rng.integers(3)]
    path = folder / part / WEIGHTS[part]
    content = bytearray(path.read_bytes())
    if rng.integers(2):
        path.write_bytes(content[: rng.integers(len(content) - 1)])
        return
    for place in rng.integers(0, 200, 8):
        content[place] = rng.integers(256)
    path.write_bytes(content)


def with_a_hostile_index(folder, rng):
    part = sorted(WEIGHTS)[rng.integers(3)]
    names = list(read_tensors(folder / part / WEIGHTS[part]))
    (folder / part / WEIGHTS[part]).unlink()
    shards = ("../../secret.safetensors", "/etc/passwd", "gone.safetensors", "", "..", "a\\b", 3, None, ["x"], {"a": 1})
    places = [*({name: shard for name in names} for shard in shards), {}, [], "x", None]
    index = {"metadata": {}, "weight_map": places[rng.integers(len(places))]}
    (folder / part / f"{WEIGHTS[part]}.index.json").write_text(json.dumps(index))


def with_a_wrong_key(folder, rng):
    files = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
    path = folder / files[rng.integers(len(files))]
    document = json.loads(path.read_text())
    values = (None, "x", [], {"a": 1}, -1, 10**30, 1e400, [1, "x"], True)
    keys = [*sorted(document), "surprise", "use_karras_sigmas"]
    document[keys[rng.integers(len(keys))]] = values[rng.integers(len(values))]
    path.write_text(json.dumps(document))


def with_a_broken_vocabulary(folder, rng):
    file = ("vocab.json", "merges.txt")[rng.integers(2)]
    contents = (b"", b"{}", b"\xff\xfe", b"[1]", b'{"a": 0}', b"#version\na b c\n", b"#version\nq q\n")
    (folder / "tokenizer" / file).write_bytes(contents[rng.integers(len(contents))])


FAULTS = (
    *(without_a_file, with_other_tensors, with_damaged_bytes, with_a_hostile_index, with_a_wrong_key),
    with_a_broken_vocabulary,
)


def refuse(folder, theirs, seed):
    """Whether a pipeline with a fault of a seed is refused: in one line, and nothing is written."""
    rng = np.random.default_rng(seed)
    shutil.copytree(theirs, folder / "theirs")
    FAULTS[seed % len(FAULTS)](folder / "theirs", rng)
    try:
        convert(["--source=diffusers", f"--input={folder}/theirs", f"--output={folder}/ours"])
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
        assert not (folder / "ours").exists()
        return True
    return False


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 230), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_faults_of_every_kind_end_in_a_line(seeds, theirs, tmp_path):
    refused = sum(refuse(tmp_path / str(seed), theirs[0], seed) for seed in seeds)
    assert refused > 0.85 * len(seeds)  # some keys may have the value that they are given
