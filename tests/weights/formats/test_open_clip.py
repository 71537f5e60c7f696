"""Configs and names of OpenCLIP: what is read, what is refused, and which activation a name means."""

import json

import numpy as np
import pytest

import models
from cli.errors import UserError
from models.clip import IMAGE_MEAN
from weights.files.origin import Folder
from weights.files.tensors import write_tensors
from weights.formats.open_clip import (
    CONFIG,
    clip_config,
    clip_fields,
    clip_fields_of_tensors,
    clip_to_open_clip,
    read_clip,
)

from ..clip_samples import FIELDS, RESNET, tiny

LIKE_B32 = {"vision_cfg": {"width": 768, "layers": 12, "patch_size": 32}, "text_cfg": {"width": 512}, "embed_dim": 512}


@pytest.mark.parametrize("fields", [FIELDS, RESNET, {**FIELDS, "text_end_id": 3, "logit_bias_init": -10.0}])
def test_a_written_config_reads_as_the_same_network(fields):
    document = json.loads(json.dumps(clip_config(models.create_model(**fields))))
    assert clip_fields(document["model_cfg"], document["preprocess_cfg"]) == fields


def test_without_the_flag_the_activation_is_gelu():
    assert clip_fields(LIKE_B32)["activation"] == "gelu"
    assert clip_fields({**LIKE_B32, "quick_gelu": True})["activation"] == "quick_gelu"


@pytest.mark.parametrize("fields", [FIELDS, RESNET])
def test_sizes_are_read_from_shapes(fields):
    _, params, variables = tiny(fields)
    shapes = clip_to_open_clip(params, variables)
    told = clip_fields_of_tensors(shapes, "gelu")
    unknown = ("logit_scale_init", "image_mean", "image_std")
    assert {key: told[key] for key in told if key not in unknown} == {
        key: fields[key] for key in fields if key not in unknown
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, "timm_model_name is 'vit_base'"),
        (
            {"vision_cfg": {"pool_type": "avg", "no_ln_pre": True}},
            "no_ln_pre is True; it must be False; model_cfg.vision_cfg.pool_type is 'avg'",
        ),
        ({"text_cfg": {"hf_model_name": "bert"}}, "hf_model_name is 'bert'"),
        ({"text_cfg": {"pool_type": "last"}}, "pool_type is 'last'"),
        ({"text_cfg": {"norm_kwargs": {"eps": 1e-6}}}, "norm_kwargs is"),
        ({"custom_text": True}, "custom_text is True"),
        ({"multimodal_cfg": {}}, "model_cfg.multimodal_cfg: not known here"),
        ({"vision_cfg": {"image_size": [224, 112]}}, "only squares"),
    ],
)
def test_what_ours_cannot_compute_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        clip_fields({**LIKE_B32, **change})


def test_what_theirs_cannot_compute_is_refused():
    with pytest.raises(UserError, match="activation is 'relu'"):
        clip_config(models.create_model(**{**FIELDS, "activation": "relu"}))
    with pytest.raises(UserError, match=r"image_layers are \(1, 2\); a ResNet of OpenCLIP has 4 stages"):
        clip_config(models.create_model(**{**RESNET, "image_layers": (1, 2)}))
    with pytest.raises(UserError, match="its image_heads 3 do not divide 64"):
        clip_config(models.create_model(**{**FIELDS, "image_heads": 3}))


@pytest.mark.parametrize(("name", "activation"), [("ViT-B-32", "gelu"), ("ViT-B-32-quickgelu", "quick_gelu")])
def test_a_name_tells_the_activation_where_there_is_no_config(name, activation, tmp_path):
    _, params, _ = tiny()
    tensors = clip_to_open_clip(params, {})
    # As a training run of several devices wraps them.
    write_tensors(tmp_path / "open_clip_model.safetensors", {f"module.{key}": tensors[key] for key in tensors})
    fields, read = read_clip(Folder(tmp_path), name)
    assert fields["activation"] == activation and fields["image_mean"] == IMAGE_MEAN
    assert read.keys() == tensors.keys()
    with pytest.raises(UserError, match="weights do not tell their activation; give OpenCLIP's name"):
        read_clip(Folder(tmp_path))
    with pytest.raises(UserError, match="--name=EVA02-L-14"):
        read_clip(Folder(tmp_path), "EVA02-L-14")
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(UserError, match="leave --name out"):
        read_clip(Folder(tmp_path), name)
    with pytest.raises(UserError, match="has no model_cfg"):
        read_clip(Folder(tmp_path))


@pytest.mark.parametrize(("name", "head_width"), [("ViT-H-14", 80), ("ViT-bigG-14", 104), ("ViT-L-14", 64)])
def test_large_networks_have_wider_heads(name, head_width, tmp_path):
    _, params, _ = tiny({**FIELDS, "image_width": 2 * head_width, "image_layers": 1, "image_heads": 2})
    write_tensors(tmp_path / "open_clip_model.safetensors", clip_to_open_clip(params, {}))
    assert read_clip(Folder(tmp_path), name)[0]["image_heads"] == 2


def test_other_weights_are_named():
    with pytest.raises(UserError, match="there is no ln_final.weight"):
        clip_fields_of_tensors({"fc.weight": np.zeros((2, 2))}, "gelu")
