"""Llama and Llama Vision in the layouts of transformers and Meta: sizes, turned heads, grids, parts, and shards."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from cli.errors import UserError
from models.layers.tile_positions import spread_grid
from scripts.convert import main as convert
from weights.files.origin import open_origin
from weights.files.tensors import Deferred, in_shards, read_tensors, write_tensors
from weights.formats import FORMATS, meta_llama, transformers_mllama
from weights.formats.contract import Network, write_files
from weights.run import Run

from ...models.random_parameters import random_parameters

LLAMA = {"name": "llama", "text_vocab_size": 40, "width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_hidden": 48}
LLAMA |= {"rope_factor": 8.0}
VISION = {**LLAMA, "name": "vision_adapter", "depth": 4, "cross_layers": (1, 3), "image_token": 40, "tile_size": 28}
VISION |= {"patch_size": 14, "image_width": 32, "image_heads": 16, "image_layers": 31, "global_layers": 1}
VISION |= {"feature_layers": (3, 7, 15, 23, 30), "image_mlp_ratio": 1.0, "tile_tables": "grid"}


def network(fields):
    model = models.create_model(**fields)
    return Network(model, random_parameters(model), {})


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, one), jax.tree.map(np.asarray, other))


@pytest.mark.parametrize("fields", [LLAMA, {**LLAMA, "tied": True, "rope_factor": 32.0}], ids=["own head", "tied"])
@pytest.mark.parametrize("form", ["transformers", "meta"])
def test_a_llama_in_and_out_again(form, fields, tmp_path):
    source = network(fields)
    write = FORMATS[form].write
    assert write is not None
    write_files(tmp_path / "theirs", write(source))
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    assert models.create_model(**run.config.models.llama) == source.model
    assert_same(run.load().params["llama"], source.params)
    convert([f"--to={form}", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    for file in (tmp_path / "theirs").iterdir():
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()


def test_heads_are_turned_as_neighbors_in_meta_s_layout():
    source = network(LLAMA)
    tensors = meta_llama.write_meta(source)["consolidated.safetensors"]
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    frequencies = source.model.rotary.frequencies(8)
    angles = np.arange(5)[:, None, None] * frequencies

    def turned(name, heads):
        pairs = (x @ np.asarray(tensors[name]).T).reshape(5, heads, 4, 2)
        whole = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack([whole.real, whole.imag], axis=-1).reshape(5, heads, 8)

    q, k = turned("layers.0.attention.wq.weight", 4), turned("layers.0.attention.wk.weight", 2)
    theirs = np.einsum("lnk,mnk->nlm", q, np.repeat(k, 2, axis=1))
    attention = source.params["blocks_0"]["attention"]
    q = np.einsum("ld,dnk->lnk", x, attention["query"]["kernel"])
    k = np.einsum("ld,dnk->lnk", x, attention["key_value"]["kernel"][:, 0])
    q, k = (np.asarray(source.model.rotary.turn(jnp.asarray(each)[None], jnp.arange(5)))[0] for each in (q, k))
    np.testing.assert_allclose(np.einsum("lnk,mnk->nlm", q, np.repeat(k, 2, axis=1)), theirs, rtol=1e-4, atol=1e-5)


def test_llama_vision_of_meta_in_out_and_to_transformers(tmp_path):
    source = network(VISION)
    files = meta_llama.write_meta(source)
    names = {name: tensor.shape for name, tensor in files["consolidated.safetensors"].items()}
    assert names["vision_model.vision_encoder.conv1._linear.weight"] == (32, 588)
    assert names["vision_model.vision_encoder.pre_tile_pos_embed.embedding"] == (4, 4, 1, 32)
    assert names["text_model.cross_attention_layers.1.gate_ffwd"] == (1,)
    write_files(tmp_path, files)
    read = meta_llama.read_meta(open_origin(str(tmp_path)))
    fields = read.config["models"]["vision_adapter"]
    assert models.create_model(**{**fields, "image_mlp_ratio": 1.0, "rope_factor": 8.0}) == source.model
    assert_same(read.params["vision_adapter"], source.params)

    # transformers has a table of each canvas; from these there is a way back, but not from others.
    tensors = transformers_mllama.mllama_tensors(source.model, source.params)
    tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    model = models.create_model(**{**VISION, "tile_tables": "canvases"})
    tables = jax.tree.map(
        np.asarray, transformers_mllama.mllama_params(model, {k: np.asarray(v) for k, v in tensors.items()})
    )
    grid = np.asarray(meta_llama.with_grids(model, tables)["encoder"]["first_tile"]["grid"])
    np.testing.assert_array_equal(spread_grid(jnp.asarray(grid)), tables["encoder"]["first_tile"]["embedding"])
    with pytest.raises(UserError, match="its tile_position has a table of each canvas that is no corner of one grid"):
        meta_llama.with_grids(model, random_parameters(model))


def test_parts_of_a_large_model_are_joined():
    source = network(LLAMA)
    files = meta_llama.write_meta(source)
    tensors = {name: np.asarray(tensor) for name, tensor in files["consolidated.safetensors"].items()}
    parts = [{}, {}]
    for name, array in tensors.items():
        axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        halves = [array, array] if "norm" in name else np.split(array, 2, axis=axis)
        for part, half in zip(parts, halves, strict=True):
            part[name] = half
    joined = meta_llama._joined(parts)
    assert {name: array.shape for name, array in joined.items()} == {
        name: array.shape for name, array in tensors.items()
    }
    for name, array in tensors.items():
        np.testing.assert_array_equal(joined[name], array)


@pytest.mark.parametrize("key", ["norm_eps", "n_heads", "vision_num_cross_attention_layers", "other"])
def test_params_that_ours_cannot_compute_are_one_line(key, tmp_path):
    files = meta_llama.write_meta(network(LLAMA))
    wrong = {"norm_eps": 1e-6, "n_heads": 5, "vision_num_cross_attention_layers": "8", "other": 1}
    write_files(tmp_path, {**files, "params.json": {**files["params.json"], key: wrong[key]}})
    with pytest.raises(UserError) as error:
        meta_llama.read_meta(open_origin(str(tmp_path)))
    assert "\n" not in str(error.value)


def test_networks_are_written_in_shards_that_are_made_one_by_one(tmp_path):
    made = []

    def tensor(name):
        def make():
            made.append(name)
            return np.full((10, 10), len(made), np.float32)

        return Deferred((10, 10), np.float32, make)

    files = in_shards({name: tensor(name) for name in "abcde"}, largest=900)
    index = files["model.safetensors.index.json"]
    assert index["metadata"] == {"total_size": 2000} and len(files) == 4 and not made
    write_files(tmp_path, files)
    assert made == list("abcde")
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(read_tensors(tmp_path / file)[name], np.full((10, 10), ord(name) - 96))
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == index
    assert list(in_shards({"a": tensor("a")})) == ["model.safetensors"]


def test_tensors_stay_in_their_file_until_they_are_used(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8)})
    array = read_tensors(path)["a"]
    base = array
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) and not array.flags.writeable
