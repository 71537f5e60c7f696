"""UNets of diffusers: what is read and written, what is refused, and the traps of the format."""

import json

import numpy as np
import pytest

import models
from cli.errors import UserError
from weights.formats.diffusers_unet import unet_config, unet_fields, unet_from_diffusers, unet_to_diffusers

from ...models.random_parameters import random_parameters
from ..clip_samples import assert_same_trees
from ..unet_samples import ADM, CLASSES, DDPM, STABLE_DIFFUSION_1, UNETS

CONDITION = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}
PLAIN = {"_class_name": "UNet2DModel", "sample_size": 32}


@pytest.mark.parametrize("name", UNETS)
def test_a_written_config_reads_as_the_same_network(name):
    config = json.loads(json.dumps(unet_config(models.create_model(**UNETS[name]))))
    assert unet_fields(config) == UNETS[name]


@pytest.mark.parametrize("fields", [ADM, CLASSES], ids=["ADM", "classes"])
def test_tensors_out_and_in_again(fields):
    model = models.create_model(**fields)
    params = random_parameters(model)
    tensors = unet_to_diffusers(model, params)
    back, variables = unet_from_diffusers(model, tensors)
    assert_same_trees(back, params)
    assert variables == {}


def test_names_and_arrangement():
    """The way up is numbered from the coarsest level; a gate stands behind what it gates."""
    model = models.create_model(**STABLE_DIFFUSION_1)
    params = random_parameters(model)
    tensors = unet_to_diffusers(model, params)
    skip = params["up_1_residual_0"]["skip"]["kernel"]
    np.testing.assert_array_equal(tensors["up_blocks.0.resnets.0.conv_shortcut.weight"], skip.transpose(3, 2, 0, 1))
    up = params["down_0_attention_0"]["blocks_0"]["mlp"]["up_gate"]["kernel"]
    gated = tensors["down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"]
    np.testing.assert_array_equal(gated, np.concatenate([up[:, 0], up[:, 1]], axis=1).T)
    key_value = params["mid_attention"]["blocks_0"]["context_attention"]["key_value"]["kernel"]
    value = tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"]
    np.testing.assert_array_equal(value, np.asarray(key_value)[:, 1].reshape(6, 16).T)
    assert tensors["mid_block.attentions.0.proj_in.weight"].shape == (16, 16, 1, 1)


def test_old_names_of_attention_are_read():
    model = models.create_model(**DDPM)
    params = random_parameters(model)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, array in unet_to_diffusers(model, params).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = array
    assert "mid_block.attentions.0.query.weight" in tensors and not any("to_q" in name for name in tensors)
    assert_same_trees(unet_from_diffusers(model, tensors)[0], params)


def test_tensors_that_do_not_fit_are_all_listed():
    model = models.create_model(**DDPM)
    tensors = unet_to_diffusers(model, random_parameters(model))
    del tensors["conv_in.bias"]
    tensors["conv_out.bias"], tensors["extra"] = np.zeros(5, np.float32), np.zeros(1, np.float32)
    message = r"missing: conv_in.bias; unexpected: extra; of another shape: conv_out.bias is \(5,\), expected \(3,\)"
    with pytest.raises(UserError, match=message):
        unet_from_diffusers(model, tensors)


def test_keys_that_a_config_leaves_out_are_the_library_s():
    fields = unet_fields(CONDITION)
    assert (fields["width"], fields["multipliers"], fields["attention_levels"]) == (320, (1, 2, 4, 4), (0, 1, 2))
    assert fields["heads"] == 8 and fields["image_size"] == 64  # 8 heads, though they are called attention_head_dim
    plain = unet_fields(PLAIN)
    assert (plain["width"], plain["multipliers"], plain["attention_levels"]) == (224, (1, 2, 3, 4), (1, 2, 3))
    assert plain["head_width"] == 8  # and here they are of width 8
    assert unet_fields({**PLAIN, "attention_head_dim": None})["heads"] == 1


def test_stable_diffusion_2_has_heads_of_one_width():
    fields = unet_fields({**CONDITION, "attention_head_dim": [5, 10, 20, 20]})
    assert fields["head_width"] == 64 and "heads" not in fields
    # The coarsest level of another network has no say where nothing there attends but the middle.
    assert unet_fields({**CONDITION, "attention_head_dim": [8, 8, 8, 8]})["heads"] == 8


def test_one_value_for_all_levels_may_be_a_list():
    lists = {"only_cross_attention": [False] * 4, "layers_per_block": [2] * 4, "cross_attention_dim": [768] * 4}
    assert unet_fields({**CONDITION, **lists, "sample_size": [64, 64]}) == unet_fields(CONDITION)


ATTENDING = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
TWO_LEVELS = {**PLAIN, "block_out_channels": [32, 64], **ATTENDING}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "PriorTransformer"}, "class 'PriorTransformer'; UNet2DModel, UNet2DConditionModel, Autoenc"),
        ({**CONDITION, "addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'; it must be None"),
        ({**CONDITION, "only_cross_attention": [True, False, False, False]}, "only_cross_attention is"),
        ({**CONDITION, "act_fn": "gelu"}, "act_fn is 'gelu'; it must be 'silu'"),
        ({**CONDITION, "attention_head_dim": [5, 10, 10, 20]}, "neither one number nor of one width"),
        ({**CONDITION, "sample_size": None}, "sample_size is None; it must be a whole number from 1"),
        ({**CONDITION, "layers_per_block": [1, 2, 2, 2]}, r"layers_per_block is \[1, 2, 2, 2\], ours one number"),
        ({**CONDITION, "resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial'"),
        ({**CONDITION, "mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        (
            {**CONDITION, "down_block_types": ["KDownBlock2D"] * 4},
            r"down_block_types\[0\] is 'KDownBlock2D'; it must be one of DownBlock2D, Cross",
        ),
        ({**PLAIN, "time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({**PLAIN, "add_attention": False}, "add_attention is False; it must be True"),
        ({**PLAIN, "freq_shift": 2, "downsample_padding": 2}, "freq_shift is 2.*downsample_padding is 2"),
        (
            {**PLAIN, "resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups is None, which leaves the norm out",
        ),
        ({**PLAIN, "attn_norm_num_groups": 16}, "attn_norm_num_groups is 16, ours is norm_num_groups, 32"),
        ({**PLAIN, "downsample_type": "resnet"}, "levels resample by convolution and by residual"),
        ({**TWO_LEVELS, "up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "attention at different levels"),
    ],
)
def test_what_ours_cannot_compute_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        unet_fields(config)


def test_the_coarsest_level_of_the_way_down_resamples_in_no_way():
    """Its type may be one that would by a convolution, beside others that do by a residual block."""
    types = {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}
    types |= {"up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"], "downsample_type": "resnet"}
    fields = unet_fields({**TWO_LEVELS, **types, "upsample_type": "resnet"})
    assert fields["resampler"] == "residual" and fields["attention_levels"] == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2}, "patch_size is 2"),
        ({"multipliers": (2, 1)}, "first level has 16 channels and its time 8"),
        ({"downsample_padding": (1, 0)}, r"downsample_padding is \(1, 0\)"),
        ({"heads": 2, "attention_levels": (0, 1)}, "2 heads differ in width between levels"),
        (
            {"attention": "transformer", "resampler": "residual"},
            "resampler is 'residual'.*transformers read no context",
        ),
        (
            {"attention": "transformer", "context_width": 6, "num_classes": 3, "class_embedding": "token"},
            "class_embedding is 'token'",
        ),
    ],
)
def test_what_theirs_cannot_compute_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        unet_config(models.create_model(**{**DDPM, **change}))
