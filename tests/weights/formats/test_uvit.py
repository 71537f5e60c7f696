"""U-ViT in its authors' layout: names in both directions, what shapes and arguments tell, and what is refused."""

import json

import jax
import numpy as np
import pytest

import models
from cli.errors import UserError
from models.uvit import UViT
from weights.files.origin import Folder, WeightsFile
from weights.files.tensors import write_tensors
from weights.formats.uvit import (
    ARGUMENTS,
    from_uvit,
    read_uvit,
    to_uvit,
    uvit_arguments,
    uvit_fields,
    uvit_fields_of_tensors,
    uvit_files,
)
from weights.sources import random_part

from ..clip_samples import assert_same_trees, tiny

SMALL = {"name": "uvit", "image_size": 4, "patch_size": 2, "in_channels": 4, "width": 64, "depth": 2, "heads": 1}
NETWORKS = {
    "unconditional": {**SMALL, "mlp_time_embed": True, "mlp_ratio": 2},
    "class": {**SMALL, "num_classes": 3, "convolution": "none"},
    "text": {**SMALL, "context_length": 77, "context_width": 6, "long_skip": "none"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back(name, tmp_path):
    model, params, _ = tiny(NETWORKS[name])
    files = uvit_files(model, params)
    file, tensors = next((name, content) for name, content in files.items() if name != ARGUMENTS)
    assert_same_trees(from_uvit(model, tensors), params)
    write_tensors(tmp_path / file, tensors)
    (tmp_path / ARGUMENTS).write_text(json.dumps(files[ARGUMENTS]))
    # From arguments, and from shapes alone, whatever lies beside the file.
    for origin in (Folder(tmp_path), WeightsFile(tmp_path / file)):
        fields, read = read_uvit(origin)
        assert models.create_model(**fields) == model and read.keys() == tensors.keys()


def test_arguments_are_those_of_the_published_classes():
    text = models.create_model(**NETWORKS["text"])
    assert uvit_arguments(text) == {
        **{"name": "uvit_t2i", "img_size": 4, "patch_size": 2, "in_chans": 4, "embed_dim": 64, "depth": 2},
        **{"num_heads": 1, "mlp_ratio": 4, "qkv_bias": False, "mlp_time_embed": False, "clip_dim": 6},
        **{"num_clip_token": 77, "conv": True, "skip": False},
    }
    assert uvit_arguments(models.create_model(**NETWORKS["unconditional"]))["num_classes"] == -1
    left_out = models.create_model(**uvit_fields({"name": "uvit_t2i"}))
    expected = UViT(image_size=224, patch_size=16, width=768, depth=12, heads=12, context_length=77, context_width=768)
    assert left_out == expected


def test_shapes_of_published_files_tell_their_networks():
    huge = UViT(
        image_size=64, patch_size=4, in_channels=4, width=1152, depth=28, heads=16, num_classes=1001, convolution="none"
    )
    shapes = jax.eval_shape(huge.init, jax.random.key(0), *huge.example_inputs(1))["params"]
    without_memory = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), np.float32), leaf.shape), shapes)
    names = {"patch_embed.proj.weight": without_memory["patch"]["kernel"].transpose(3, 2, 0, 1)}
    names |= {"pos_embed": without_memory["position"]["embedding"][None]}
    names |= {"label_emb.weight": without_memory["label"]["embedding"], "out_blocks.0.skip_linear.weight": np.zeros(1)}
    names |= {"mid_block.mlp.fc1.weight": without_memory["mid_block"]["mlp"]["up"]["kernel"].T}
    names |= {f"in_blocks.{i}.norm1.weight": np.zeros(1) for i in range(14)}
    assert models.create_model(**uvit_fields_of_tensors(names)) == huge


def test_a_network_that_takes_a_condition_can_be_a_random_part():
    part = jax.eval_shape(lambda: random_part(NETWORKS["text"], 0).trees())
    assert part["params"]["context"]["kernel"].shape == (6, 64)


def test_tensors_that_do_not_fit_are_listed():
    model, params, _ = tiny(NETWORKS["class"])
    tensors = to_uvit(model, params)
    del tensors["norm.bias"]
    tensors |= {"extra": np.zeros(1), "pos_embed": tensors["pos_embed"][0]}
    with pytest.raises(UserError, match=r"missing: norm.bias; unexpected: extra; .*pos_embed is \(6, 64\), expected"):
        from_uvit(model, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"long_skip": "project_sum", "time": "adaln"}, "long_skip is 'project_sum'; its time is 'adaln'"),
        ({"convolution": "tokens", "positions": "sincos_2d"}, "convolution is 'tokens'; its positions is 'sincos_2d'"),
        ({"activation": "relu", "out_channels": 8}, "activation is 'relu'; its out_channels is 8"),
        ({"long_skip": "none", "depth": 3}, "depth is 3, an odd one"),
        ({"num_classes": 2, "context_length": 77, "context_width": 4}, "it has classes and a context"),
    ],
)
def test_what_theirs_cannot_compute_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        to_uvit(models.create_model(**{**SMALL, **change}), {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dit"}, "is of a network 'dit'; only"),
        (
            {"name": "uvit", "qkv_bias": True, "clip_dim": 5},
            "qkv_bias is True; it must be False; clip_dim: not known here",
        ),
    ],
)
def test_what_ours_cannot_compute_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        uvit_fields(arguments)


def test_shapes_that_tell_too_little_are_refused():
    model, params, _ = tiny({**SMALL, "context_length": 5, "context_width": 6})
    with pytest.raises(UserError, match=rf"picture of 10 tokens, which no published U-ViT has; put {ARGUMENTS}"):
        uvit_fields_of_tensors(to_uvit(model, params))
    with pytest.raises(UserError, match="there is no patch_embed.proj.weight"):
        uvit_fields_of_tensors({"fc.weight": np.zeros((2, 2))})
