"""CLIP's text tower as transformers has it alone, `CLIPTextModel`: config and tensors to our fields, and back.

Names in its files begin with "text_model.", or with nothing where a newer version of the library wrote them: both are
read, the first is written. What end token a config names is not asked: it is the tokenizer's, and of those published
the config often has another.
"""

import re
from collections.abc import Mapping
from typing import Any

from cli.errors import UserError
from models.clip_text import ClipText
from weights.files.fields import read_fields
from weights.files.layout import Layout, Tensors, Tree
from weights.files.origin import Origin, read_weights
from weights.formats.contract import Files
from weights.formats.transformers import ACTIVATIONS, CLIP, TEXT_TOWER

CLASS = "CLIPTextModel"
CONFIG = "config.json"
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("model.fp16.safetensors", "model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"),
    "pytorch_model.fp16.bin",
)

LAYOUT = Layout(what="this CLIP text tower in the layout of transformers", rules=CLIP.rules, ignored=CLIP.ignored)
_PREFIX = "text_model."


def clip_text_fields(config: Mapping[str, Any], end_id: int, pad_id: int) -> dict[str, Any]:
    """Reads a `CLIPTextModel`'s config as {"name": "clip_text", fields of `models.clip_text.ClipText`}.

    Args:
      config: config.json.
      end_id: of its tokenizer.
      pad_id: what that fills captions up with.

    Raises:
      UserError: if it is another model's, or a tower that ours cannot compute, or has fewer ids than its tokenizer.
    """
    what = "this CLIP text tower"
    if (kind := config.get("model_type")) not in ("clip_text_model", None):
        raise UserError(f"the text encoder is of model_type {kind!r}; only 'clip_text_model' is converted")
    given = read_fields(what, config, TEXT_TOWER)
    if given["intermediate_size"] != 4 * given["hidden_size"]:
        wrong = f"its intermediate_size is {given['intermediate_size']}, ours {4 * given['hidden_size']}"
        raise UserError(f"{what} cannot be converted: {wrong}")
    if given["vocab_size"] <= max(end_id, pad_id):
        raise UserError(
            f"{what} has {given['vocab_size']} ids, and its tokenizer uses {max(end_id, pad_id)}; they belong to "
            "different networks"
        )
    return {
        "name": "clip_text",
        "text_vocab_size": given["vocab_size"],
        "text_length": given["max_position_embeddings"],
        "text_end_id": end_id,
        "text_pad_id": pad_id,
        "text_width": given["hidden_size"],
        "text_layers": given["num_hidden_layers"],
        "text_heads": given["num_attention_heads"],
        "activation": ACTIVATIONS[given["hidden_act"]],
    }


def clip_text_config(model: ClipText) -> dict[str, Any]:
    """Returns config.json of a `CLIPTextModel` that computes what `model` does.

    Raises:
      UserError: if there is none.
    """
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if model.activation not in names:
        raise UserError(f"this text tower cannot be written for transformers: its activation is {model.activation!r}")
    return {
        "architectures": [CLASS],
        "model_type": "clip_text_model",
        "vocab_size": model.text_vocab_size,
        "hidden_size": model.text_width,
        "intermediate_size": 4 * model.text_width,
        "num_hidden_layers": model.text_layers,
        "num_attention_heads": model.text_heads,
        "max_position_embeddings": model.text_length,
        "hidden_act": names[model.activation],
        "layer_norm_eps": 1e-5,
        "projection_dim": model.text_width,  # of another class
        "bos_token_id": model.text_end_id - 1,
        "eos_token_id": model.text_end_id,
        "pad_token_id": model.text_pad_id,
    }


def with_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names of files, where a newer version of the library wrote them without a prefix."""
    return {name if name.startswith(_PREFIX) else f"{_PREFIX}{name}": array for name, array in tensors.items()}


def read_clip_text(origin: Origin) -> Tensors:
    """The tensors of what `CLIPTextModel.save_pretrained` wrote.

    Raises:
      UserError: if there are none, or they cannot be read.
    """
    tensors = with_prefix(read_weights(origin, WEIGHTS))
    return {name: array for name, array in tensors.items() if not re.fullmatch(LAYOUT.ignored, name)}


def clip_text_files(model: ClipText, params: Tree) -> Files:
    """What `CLIPTextModel.from_pretrained` reads; tensors are made one by one.

    Raises:
      UserError: if there is no such class.
    """
    return {CONFIG: clip_text_config(model), WEIGHTS[0]: LAYOUT.write_deferred({"params": params})}
