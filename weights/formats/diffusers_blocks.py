"""What the networks of diffusers share: names of residual blocks and of plain attention, old ones too."""

import re
from collections.abc import Mapping
from typing import Any

from weights.files.layout import CONVOLUTION, Rule, linear

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def residual_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a residual block; `ours` has one group."""
    return (
        Rule(rf"{ours}/norm_(\d)/(\w+)", rf"{theirs}.norm\2.\3"),
        Rule(rf"{ours}/conv_(\d)/(\w+)", rf"{theirs}.conv\2.\3", CONVOLUTION),
        Rule(rf"{ours}/time/(\w+)", rf"{theirs}.time_emb_proj.\2"),
        Rule(rf"{ours}/skip/(\w+)", rf"{theirs}.conv_shortcut.\2", CONVOLUTION),
    )


def attention_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of an attention block; `ours` has one group."""
    names = tuple(rf"{theirs}.to_{name}.\2" for name in "qkv")
    return (
        Rule(rf"{ours}/norm/(\w+)", rf"{theirs}.group_norm.\2"),
        Rule(rf"{ours}/attention/query_key_value/(\w+)", names),
        Rule(rf"{ours}/attention/out/(\w+)", rf"{theirs}.to_out.0.\2", linear(inputs=2)),
    )


def with_new_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names of today, where a file has older ones in its attention."""
    old = rf"(.*\.attentions\.\d+)\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)"
    named = {}
    for name, array in tensors.items():
        match = re.fullmatch(old, name)
        named[f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else name] = array
    return named
