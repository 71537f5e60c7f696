"""UniDiffuser's network as diffusers has it, `UniDiffuserModel`: config and tensors to ours, and back.

The traps of that format: its class holds a patch embedding twice, of which the second is read by nothing; and its
config has keys whose defaults are another network's, such as the gated GELU.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from models.unidiffuser import UniDiffuser
from weights.files.fields import IDLE, Field, fixed, flag, read_fields, whole
from weights.files.layout import CONVOLUTION, Form, Layout, Rule, Tensors, Tree, linear

CLASS = "UniDiffuserModel"
IGNORED = r"transformer\.pos_embed\.proj\.(weight|bias)"
_READ, _UNREAD = "vae_img_in.proj", "transformer.pos_embed.proj"

_FIXED: dict[str, Any] = {
    **{"attention_bias": False, "block_type": "unidiffuser", "pre_layer_norm": False, "norm_type": "layer_norm"},
    **{"norm_elementwise_affine": True, "use_patch_pos_embed": False, "use_timestep_embedding": False},
    **{"only_cross_attention": False, "cross_attention_dim": None, "num_vector_embeds": None, "dropout": 0.0},
    **{"num_embeds_ada_norm": None},
}
# Keys that must be there: the class's own default is another network.
_NAMED: dict[str, Any] = {"activation_fn": "gelu"}
_IDLE = ("norm_num_groups", "use_linear_projection", "upcast_attention", "ff_final_dropout")
TABLE: dict[str, Field] = {
    "text_dim": whole(768),
    "clip_img_dim": whole(512),
    "num_text_tokens": whole(77),
    "num_attention_heads": whole(16),
    "attention_head_dim": whole(88),
    "in_channels": whole(),
    "out_channels": whole(None).or_null(),
    "num_layers": whole(1, high=1024),
    "sample_size": whole(),
    "patch_size": whole(),
    "use_data_type_embedding": flag(False),
    **{key: fixed(value) for key, value in _FIXED.items()},
    **{key: Field(repr(value), lambda given, value=value: given == value) for key, value in _NAMED.items()},
    **dict.fromkeys(_IDLE, IDLE),
}

_POSITIONS = Form(outward=lambda array: array[None], inward=lambda array, shape: array.reshape(shape))
_POSITION = Form(outward=lambda array: array[None, None], inward=lambda array, shape: array.reshape(shape))


def _blocks(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of layers; `ours` has no group, or one."""
    count = ours.count("(")
    leaf = rf"\{count + 1}"
    return (
        Rule(rf"{ours}/attention/query_key_value/(\w+)", tuple(rf"{theirs}.attn1.to_{name}.{leaf}" for name in "qkv")),
        Rule(rf"{ours}/attention/out/(\w+)", rf"{theirs}.attn1.to_out.0.{leaf}", linear(inputs=2)),
        Rule(rf"{ours}/attention_norm/(\w+)", rf"{theirs}.norm1.{leaf}"),
        Rule(rf"{ours}/mlp_norm/(\w+)", rf"{theirs}.norm3.{leaf}"),
        Rule(rf"{ours}/mlp/up/(\w+)", rf"{theirs}.ff.net.0.proj.{leaf}"),
        Rule(rf"{ours}/mlp/down/(\w+)", rf"{theirs}.ff.net.2.{leaf}"),
    )


LAYOUT = Layout(
    what="this UniDiffuser in the layout of diffusers",
    rules=(
        Rule(r"patch/(\w+)", rf"{_READ}.\1", CONVOLUTION),
        Rule(r"text_in/(\w+)", r"text_in.\1"),
        Rule(r"clip_in/(\w+)", r"clip_img_in.\1"),
        Rule(r"position/embedding", "pos_embed", other=_POSITIONS),
        Rule(r"data_type/embedding", "data_type_token_embedding.weight"),
        Rule(r"data_type_position", "data_type_pos_embed_token", other=_POSITION),
        *_blocks(r"in_blocks_(\d+)", r"transformer.transformer_in_blocks.\1"),
        *_blocks(r"mid_block", "transformer.transformer_mid_block"),
        *_blocks(r"out_blocks_(\d+)", r"transformer.transformer_out_blocks.\1.block"),
        Rule(r"skips_(\d+)/projection/(\w+)", r"transformer.transformer_out_blocks.\1.skip.skip_linear.\2"),
        Rule(r"skips_(\d+)/norm/(\w+)", r"transformer.transformer_out_blocks.\1.skip.norm.\2"),
        Rule(r"final_norm/(\w+)", r"transformer.norm_out.\1"),
        Rule(r"pixel_head/(\w+)", r"vae_img_out.\1"),
        Rule(r"clip_head/(\w+)", r"clip_img_out.\1"),
        Rule(r"text_head/(\w+)", r"text_out.\1"),
    ),
    ignored=IGNORED,
)


def unidiffuser_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the class's config as {"name": "unidiffuser", fields of `models.unidiffuser.UniDiffuser`}.

    Raises:
      UserError: if it is another network's, or one that ours cannot compute.
    """
    given = read_fields("this UniDiffuser", config, TABLE)
    problems = []
    if given["out_channels"] not in (None, given["in_channels"]):
        problems.append(f"its out_channels {given['out_channels']} are not its in_channels {given['in_channels']}")
    if given["num_layers"] % 2 or given["num_layers"] < 2:
        problems.append(f"its num_layers {given['num_layers']} make no two halves")
    if given["sample_size"] % given["patch_size"]:
        problems.append(f"its patch_size {given['patch_size']} does not divide its sample_size {given['sample_size']}")
    if problems:
        raise UserError(f"this UniDiffuser cannot be converted: {'; '.join(problems)}")
    return {
        "name": "unidiffuser",
        "image_size": given["sample_size"],
        "patch_size": given["patch_size"],
        "width": given["num_attention_heads"] * given["attention_head_dim"],
        "depth": given["num_layers"],
        "heads": given["num_attention_heads"],
        "in_channels": given["in_channels"],
        "clip_width": given["clip_img_dim"],
        "text_length": given["num_text_tokens"],
        "text_width": given["text_dim"],
        "data_types": 2 if given["use_data_type_embedding"] else 0,
        "mlp_ratio": 4,
        "activation": "gelu",
    }


def unidiffuser_config(model: UniDiffuser) -> dict[str, Any]:
    """Returns config.json of the class that computes what `model` does.

    Raises:
      UserError: if there is none; says all reasons.
    """
    problems = [
        f"its {field} is {getattr(model, field)!r}, theirs {wanted!r}"
        for field, wanted in (("mlp_ratio", 4), ("activation", "gelu"))
        if getattr(model, field) != wanted
    ]
    if model.data_types not in (0, 2):
        problems.append(f"its data_types are {model.data_types}, theirs 0 or 2")
    if problems:
        raise UserError(f"this UniDiffuser cannot be written for diffusers: {'; '.join(problems)}")
    return {
        "_class_name": CLASS,
        "text_dim": model.text_width,
        "clip_img_dim": model.clip_width,
        "num_text_tokens": model.text_length,
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "in_channels": model.in_channels,
        "out_channels": model.in_channels,
        "num_layers": model.depth,
        "sample_size": model.image_size,
        "patch_size": model.patch_size,
        "use_data_type_embedding": model.data_types > 0,
        "norm_num_groups": 32,
        **_FIXED,
        **_NAMED,
    }


def unidiffuser_from_diffusers(model: UniDiffuser, tensors: Mapping[str, np.ndarray]) -> Tree:
    """Converts the class's tensors to the parameters of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    return LAYOUT.read(model, tensors)["params"]


def unidiffuser_to_diffusers(params: Tree) -> Tensors:
    """Converts parameters to the class's tensors, float32, the patch embedding that nothing reads among them."""
    tensors = LAYOUT.write({"params": params})
    return tensors | {f"{_UNREAD}.{leaf}": tensors[f"{_READ}.{leaf}"].copy() for leaf in ("weight", "bias")}
