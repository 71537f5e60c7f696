"""DiT as diffusers has it, `DiTTransformer2DModel`: config and tensors to our fields and parameters, and back.

Two of its numbers are not the authors': the waves of the time end at the last period, and the second norm of a layer
adds 1e-5. And each layer has a copy of the embeddings of time and class, which are the same in all that was converted;
where they differ, the network is another one than DiT.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from models.dit import DiT
from weights.files.fields import IDLE, Field, fixed, read_fields, real, whole
from weights.files.layout import CONVOLUTION, Layout, Rule, Tensors, Tree, linear

CLASS = "DiTTransformer2DModel"
PIPELINE_FOLDER = "transformer"

_FIXED: dict[str, Any] = {
    **{"attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero"},
    **{"norm_elementwise_affine": False, "dropout": 0.0},
}
# What the class does not read, but older files of the class that this one was made of hold.
_OLD: dict[str, Any] = {
    **{"num_vector_embeds": None, "cross_attention_dim": None, "use_linear_projection": False},
    **{"only_cross_attention": False, "double_self_attention": False},
}
TABLE: dict[str, Field] = {
    "num_attention_heads": whole(16),
    "attention_head_dim": whole(72),
    "in_channels": whole(4),
    "out_channels": whole().or_null(),
    "num_layers": whole(28, high=1024),
    "sample_size": whole(32),
    "patch_size": whole(2),
    "num_embeds_ada_norm": whole(1000),
    "norm_eps": real(1e-5, low=0, above=True),
    **{key: fixed(value) for key, value in (_FIXED | _OLD).items()},
    **dict.fromkeys(("norm_num_groups", "upcast_attention"), IDLE),
}

_EMBEDDINGS = "norm1.emb."
LAYOUT = Layout(
    what="this DiT in the layout of diffusers",
    rules=(
        Rule(r"patch/(\w+)", r"pos_embed.proj.\1", CONVOLUTION),
        Rule(r"time_(\d)/(\w+)", rf"transformer_blocks.0.{_EMBEDDINGS}timestep_embedder.linear_\1.\2"),
        Rule(r"label/(\w+)", rf"transformer_blocks.0.{_EMBEDDINGS}class_embedder.embedding_table.\1"),
        Rule(r"blocks_(\d+)/modulation/(\w+)", r"transformer_blocks.\1.norm1.linear.\2"),
        Rule(
            r"blocks_(\d+)/attention/query_key_value/(\w+)",
            tuple(rf"transformer_blocks.\1.attn1.to_{name}.\2" for name in "qkv"),
        ),
        Rule(r"blocks_(\d+)/attention/out/(\w+)", r"transformer_blocks.\1.attn1.to_out.0.\2", linear(inputs=2)),
        Rule(r"blocks_(\d+)/mlp/up/(\w+)", r"transformer_blocks.\1.ff.net.0.proj.\2"),
        Rule(r"blocks_(\d+)/mlp/down/(\w+)", r"transformer_blocks.\1.ff.net.2.\2"),
        Rule(r"final_modulation/(\w+)", r"proj_out_1.\1"),
        Rule(r"pixel_head/(\w+)", r"proj_out_2.\1"),
    ),
)


def dit_from_diffusers(model: DiT, tensors: Mapping[str, Any]) -> Tree:
    """Converts the tensors of the library's network to the parameters of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them; or layers embed time or class
        differently.
    """
    kept = {}
    for name, array in tensors.items():
        match = re.fullmatch(rf"transformer_blocks\.(\d+)\.({re.escape(_EMBEDDINGS)}.*)", name)
        if match is None or match[1] == "0":
            kept[name] = array
            continue
        first = tensors.get(f"transformer_blocks.0.{match[2]}")
        if first is None or not np.array_equal(first, array):
            raise UserError(
                f"{name} is not that of transformer_blocks.0: layers embed time or class differently, in ours all alike"
            )
    return LAYOUT.read(model, kept)["params"]


def dit_to_diffusers(model: DiT, params: Tree) -> Tensors:
    """Converts parameters to the tensors of the library's network, float32."""
    tensors = LAYOUT.write({"params": params})
    first = f"transformer_blocks.0.{_EMBEDDINGS}"
    copies = {name.removeprefix(first): array for name, array in tensors.items() if name.startswith(first)}
    for layer in range(1, model.depth):
        tensors |= {f"transformer_blocks.{layer}.{_EMBEDDINGS}{name}": array for name, array in copies.items()}
    return tensors


def dit_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the library's config as {"name": "dit", fields of `models.dit.DiT`}.

    Raises:
      UserError: if it is another network's, or one that ours cannot compute; says all reasons.
    """
    given = read_fields("this DiT", config, TABLE)
    return {
        "name": "dit",
        "image_size": given["sample_size"],
        "patch_size": given["patch_size"],
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"] or given["in_channels"],
        "width": given["num_attention_heads"] * given["attention_head_dim"],
        "depth": given["num_layers"],
        "heads": given["num_attention_heads"],
        "num_classes": given["num_embeds_ada_norm"] + 1,
        "last_period": True,
        "mlp_norm_epsilon": given["norm_eps"],
    }


def dit_config(model: DiT) -> dict[str, Any]:
    """Returns config.json of the library's network that computes what `model` does.

    Raises:
      UserError: if there is none; says all reasons.
    """
    problems = [
        f"its {field} is {getattr(model, field)!r}, theirs {wanted!r}"
        for field, wanted in (("context_width", 0), ("mlp_ratio", 4), ("last_period", True))
        if getattr(model, field) != wanted
    ]
    if model.num_classes < 2:
        problems.append(f"its num_classes is {model.num_classes}, and theirs has one at least, and one for none")
    if problems:
        raise UserError(f"this DiT cannot be written for diffusers: {'; '.join(problems)}")
    return {
        "_class_name": CLASS,
        **_FIXED,
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "num_layers": model.depth,
        "sample_size": model.image_size,
        "patch_size": model.patch_size,
        "num_embeds_ada_norm": model.num_classes - 1,
        "norm_eps": model.mlp_norm_epsilon,
    }
