"""What the networks of diffusers share: names of residual blocks and of attention, old ones too."""

import re
from collections.abc import Mapping
from typing import Any

from weights.files.layout import CONVOLUTION, LINEAR, Form, Rule, linear

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


# The 1x1 convolution or the dense layer that a spatial transformer begins and ends with.
_PROJECTION = Form(
    outward=lambda array: (CONVOLUTION if array.ndim == 4 else LINEAR).outward(array),
    inward=lambda array, shape: (CONVOLUTION if len(shape) == 4 else LINEAR).inward(array, shape),
)


def transformer_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a spatial transformer; `ours` has one group."""
    rules = [
        Rule(rf"{ours}/norm/(\w+)", rf"{theirs}.norm.\2"),
        Rule(rf"{ours}/input/(\w+)", rf"{theirs}.proj_in.\2", _PROJECTION),
        Rule(rf"{ours}/output/(\w+)", rf"{theirs}.proj_out.\2", _PROJECTION),
    ]
    ours, theirs = rf"{ours}/blocks_(\d+)", rf"{theirs}.transformer_blocks.\2"
    for norm, number in (("self", 1), ("context", 2), ("mlp", 3)):
        rules.append(Rule(rf"{ours}/{norm}_norm/(\w+)", rf"{theirs}.norm{number}.\3"))
    for kind, number in (("self", 1), ("context", 2)):
        mine, other = rf"{ours}/{kind}_attention", rf"{theirs}.attn{number}"
        rules += [
            Rule(rf"{mine}/query/(\w+)", rf"{other}.to_q.\3"),
            Rule(rf"{mine}/key_value/(\w+)", tuple(rf"{other}.to_{name}.\3" for name in "kv")),
            Rule(rf"{mine}/out/(\w+)", rf"{other}.to_out.0.\3", linear(inputs=2)),
        ]
    rules.append(Rule(rf"{ours}/mlp/up_gate/(\w+)", rf"{theirs}.ff.net.0.proj.\3"))
    return (*rules, Rule(rf"{ours}/mlp/down/(\w+)", rf"{theirs}.ff.net.2.\3"))


def with_new_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names of today, where a file has older ones in its attention."""
    old = rf"(.*\.attentions\.\d+)\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)"
    named = {}
    for name, array in tensors.items():
        match = re.fullmatch(old, name)
        named[f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else name] = array
    return named
