"""UniDiffuser's captioner as diffusers has it, `UniDiffuserTextDecoder`: config and tensors to ours, and back.

The traps of that format: its GPT-2 computes the exact GELU where its config says "gelu", as all published folders do,
while the authors' code has GPT-2's own with the same weights; its class saves no safetensors, while what it loads
must hold the head beside the table of embeddings that it is; and nothing in it says which id ends captions, so that it
is taken for the last one, as published.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from models.captioner import Captioner
from weights.files.fields import Field, read_fields, whole
from weights.files.layout import Layout, Rule, Tensors, Tree
from weights.formats.transformers_gpt2 import TABLE as GPT2_TABLE
from weights.formats.transformers_gpt2 import activation_name, gpt2_fields, gpt2_rules, untied

CLASS = "UniDiffuserTextDecoder"
IGNORED = r"transformer\.transformer\.h\.\d+\.attn\.(bias|masked_bias)"

_TABLE_OF_EMBEDDINGS, _HEAD = "transformer.transformer.wte.weight", "transformer.lm_head.weight"
_NOT_THEIRS = ("tie_word_embeddings",)
TABLE: dict[str, Field] = {
    **{key: field for key, field in GPT2_TABLE.items() if key not in _NOT_THEIRS},
    "prefix_length": whole(),
    "prefix_inner_dim": whole(),
    "prefix_hidden_dim": whole(),
}
LAYOUT = Layout(
    what="this captioner in the layout of diffusers",
    rules=(
        Rule(r"(encode|decode)_prefix/(\w+)", r"\1_prefix.\2"),
        *gpt2_rules("language/", "transformer.transformer."),
    ),
    ignored=IGNORED,
)


def text_decoder_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the class's config as {"name": "captioner", fields of `models.captioner.Captioner`}.

    Raises:
      UserError: if it is another network's, or one that ours cannot compute.
    """
    what = "this captioner"
    given = read_fields(what, config, TABLE)
    language = {key: value for key, value in config.items() if key in GPT2_TABLE}
    return {
        "name": "captioner",
        **gpt2_fields(what, language),
        "feature_width": given["prefix_inner_dim"],
        "prefix_length": given["prefix_length"],
        "mapper": "bottleneck",
        "latent_width": given["prefix_hidden_dim"],
        "text_end_id": given["vocab_size"] - 1,  # of GPT-2's vocabulary with one more, "<|EOS|>", as published
    }


def text_decoder_config(model: Captioner) -> dict[str, Any]:
    """Returns config.json of the class that computes what `model` does.

    Raises:
      UserError: if there is none.
    """
    problems = lost_end(model)
    if model.mapper != "bottleneck":
        problems.append(f"its mapper is {model.mapper!r}, theirs a bottleneck")
    if problems:
        raise UserError(f"this captioner cannot be written for diffusers: {'; '.join(problems)}")
    return {
        "_class_name": CLASS,
        "prefix_length": model.prefix_length,
        "prefix_inner_dim": model.feature_width,
        "prefix_hidden_dim": model.latent_width,
        "vocab_size": model.text_vocab_size,
        "n_positions": model.length,
        "n_embd": model.width,
        "n_layer": model.depth,
        "n_head": model.heads,
        "n_inner": model.mlp_hidden,
        "activation_function": activation_name(model.activation),
        "layer_norm_epsilon": 1e-5,
    }


def lost_end(model: Captioner) -> list[str]:
    """Why other projects' files would make captions of a captioner end otherwise; [] if they do not."""
    last = model.text_vocab_size - 1
    if model.text_end_id in (None, last):
        return []
    return [f"its text_end_id is {model.text_end_id}, and their captions end with the last id, {last}"]


def text_decoder_from_diffusers(model: Captioner, tensors: Mapping[str, np.ndarray]) -> Tree:
    """Converts the class's tensors to the parameters of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them; or its head is not tied.
    """
    return LAYOUT.read(model, untied("this captioner", tensors, _HEAD, _TABLE_OF_EMBEDDINGS))["params"]


def text_decoder_to_diffusers(params: Tree) -> Tensors:
    """Converts parameters to the class's tensors, float32."""
    tensors = LAYOUT.write({"params": params})
    return {**tensors, _HEAD: tensors[_TABLE_OF_EMBEDDINGS].copy()}
