"""Configs of transformers' CLIPModel: what is read, what is refused, and the traps of the format."""

import json

import pytest

import models
from cli.errors import UserError
from models.clip import IMAGE_MEAN
from weights.formats.transformers import clip_configs, clip_fields, mlp_ratio

from ..clip_samples import FIELDS, RESNET


@pytest.mark.parametrize("change", [{}, {"text_end_id": 37, "activation": "gelu_tanh", "image_mlp_ratio": 1.5}])
def test_a_written_config_reads_as_the_same_network(change):
    fields = {**FIELDS, **change}
    config, preprocessor = (
        json.loads(json.dumps(document)) for document in clip_configs(models.create_model(**fields))
    )
    assert clip_fields(config, preprocessor) == fields
    assert clip_fields(config)["image_mean"] == IMAGE_MEAN


def test_keys_that_a_config_leaves_out_are_the_published_ones():
    fields = clip_fields({"model_type": "clip"})
    assert fields["text_end_id"] == 49407 and fields["activation"] == "quick_gelu" and fields["embed_dim"] == 512
    assert (fields["image_width"], fields["patch_size"], fields["text_heads"]) == (768, 32, 8)


def test_the_older_of_two_keys_wins_as_in_the_library():
    old = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = {"model_type": "clip", "text_config": {"hidden_size": 512, "hidden_act": "gelu"}, "text_config_dict": old}
    fields = clip_fields(config)
    assert (fields["text_width"], fields["text_heads"], fields["activation"]) == (768, 12, "quick_gelu")
    assert (
        clip_fields({**config, "text_config_dict": None, "vision_config": {"hidden_act": "gelu"}})["text_width"] == 512
    )


@pytest.mark.parametrize(("eos", "vocab", "end"), [(2, 49408, 49407), (2, 49410, 49407), (2, 40, 39), (37, 40, 37)])
def test_an_end_id_of_2_means_the_highest_id(eos, vocab, end):
    text = {"eos_token_id": eos, "vocab_size": vocab}
    assert clip_fields({"model_type": "clip", "text_config": text})["text_end_id"] == end


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "siglip"}, "model_type 'siglip'; only 'clip'"),
        ({"text_config": {"hidden_act": "gelu"}}, "vision tower has hidden_act 'quick_gelu', ours 'gelu'"),
        ({"text_config": {"hidden_act": "tanh"}, "vision_config": {"hidden_act": "tanh"}}, "hidden_act is 'tanh'"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "the text_config of this CLIP .* layer_norm_eps is 1e-06"),
        ({"text_config": {"intermediate_size": 100}}, "intermediate_size 100, ours 2048"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1; it must be 3"),
        ({"vision_config": {"image_size": [224, 336]}}, "image_size is .* only squares"),
        ({"text_config": {"vocab_size": 40}}, "eos_token_id is 49407, which is not one of the 40 ids"),
    ],
)
def test_what_ours_cannot_compute_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        clip_fields({"model_type": "clip", **config})


def test_what_theirs_cannot_compute_is_refused():
    with pytest.raises(UserError, match="image_tower is 'resnet'"):
        clip_configs(models.create_model(**RESNET))
    other = {**FIELDS, "logit_bias_init": -10.0, "activation": "relu_squared", "text_end_id": 2, "text_heads": 5}
    with pytest.raises(UserError, match="logit bias.*'relu_squared'.*text_end_id is 2.*text_heads 5 do not divide 64"):
        clip_configs(models.create_model(**other))


@pytest.mark.parametrize(
    ("hidden", "width"), [(4304, 1152), (6144, 1408), (8192, 1664), (61, 56), (3072, 768), (49, 11)]
)
def test_a_ratio_gives_the_hidden_width_back(hidden, width):
    ratio = mlp_ratio(hidden, width)
    assert int(width * ratio) == hidden and (hidden % width or isinstance(ratio, int))
