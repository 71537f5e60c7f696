"""GPT-2 as the transformers library has it (`GPT2LMHeadModel`): its config and tensors to ours, and back.

The traps of that format: kernels lie [in, out] there, as here and unlike those of any other network of the library; the
published files lack the prefix "transformer." that the library writes, and hold each layer's causal mask; the head is
the table of embeddings, and is stored or not.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from data.tokenizer import Tokenizer
from models import create_model
from models.gpt2 import GPT2
from weights.files.fields import IDLE, Field, fixed, read_fields, whole, word
from weights.files.layout import Form, Layout, Rule
from weights.files.origin import Origin, read_weights
from weights.files.tensors import in_shards
from weights.formats.contract import Converted, Files, Tree
from weights.formats.transformers_llama import IDLE_KEYS, WEIGHTS, stored_dtype, written_dtype

_PREFIX, _HEAD = "transformer.", "lm_head.weight"
IGNORED = r"(transformer\.)*h\.\d+\.attn\.(bias|masked_bias)"

# Theirs -> ours. "gelu_new" is the published one; the library has three names of it.
ACTIVATIONS = {
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"},
    **{"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "quick_gelu": "quick_gelu"},
}
TABLE: dict[str, Field] = {
    **dict.fromkeys(IDLE_KEYS, IDLE),
    **dict.fromkeys(("n_ctx", "resid_pdrop", "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn"), IDLE),
    **dict.fromkeys((f"summary_{key}" for key in ("type", "use_proj", "activation", "first_dropout")), IDLE),
    **dict.fromkeys(("summary_proj_to_labels", "gradient_checkpointing"), IDLE),
    "vocab_size": whole(50257),
    "n_positions": whole(1024),
    "n_embd": whole(768),
    "n_layer": whole(12, high=1024),
    "n_head": whole(12),
    "n_inner": whole(None).or_null(),
    "activation_function": word("gelu_new", tuple(ACTIVATIONS)),
    "layer_norm_epsilon": fixed(1e-5),
    "scale_attn_weights": fixed(True),
    "scale_attn_by_inverse_layer_idx": fixed(False),
    "add_cross_attention": fixed(False),
    "tie_word_embeddings": fixed(True),
}


def _conv1d(inputs: int = 1) -> Form:
    """A dense layer's kernel, whose first `inputs` axes are inputs [in..., out...] <-> a matrix [in, out]."""
    return Form(
        outward=lambda array: array.reshape(int(np.prod(array.shape[:inputs])), -1),
        inward=lambda array, shape: array.reshape(shape),
    )


def gpt2_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of the network, where paths begin with `ours` and names with `theirs`."""
    block, layer = rf"{ours}blocks_(\d+)", rf"{theirs}h.\1"
    return (
        Rule(rf"{ours}embedding/embedding", f"{theirs}wte.weight"),
        Rule(rf"{ours}position/embedding", f"{theirs}wpe.weight"),
        Rule(rf"{block}/attention_norm/(\w+)", rf"{layer}.ln_1.\2"),
        Rule(rf"{block}/attention/query_key_value/(\w+)", rf"{layer}.attn.c_attn.\2", _conv1d()),
        Rule(rf"{block}/attention/out/(\w+)", rf"{layer}.attn.c_proj.\2", _conv1d(2)),
        Rule(rf"{block}/mlp_norm/(\w+)", rf"{layer}.ln_2.\2"),
        Rule(rf"{block}/mlp/up/(\w+)", rf"{layer}.mlp.c_fc.\2", _conv1d()),
        Rule(rf"{block}/mlp/down/(\w+)", rf"{layer}.mlp.c_proj.\2", _conv1d()),
        Rule(rf"{ours}final_norm/(\w+)", rf"{theirs}ln_f.\1"),
    )


LAYOUT = Layout(what="this GPT-2 in the layout of transformers", rules=gpt2_rules("", ""))


def gpt2_fields(what: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a `GPT2LMHeadModel`'s config as fields of `models.gpt2.GPT2`. Dropout is left out.

    Raises:
      UserError: if it is another network's, or one that ours cannot compute.
    """
    given = read_fields(what, config, TABLE)
    if given["n_embd"] % given["n_head"]:
        raise UserError(f"{what} cannot be converted: its {given['n_head']} heads do not divide {given['n_embd']}")
    return {
        "text_vocab_size": given["vocab_size"],
        "length": given["n_positions"],
        "width": given["n_embd"],
        "depth": given["n_layer"],
        "heads": given["n_head"],
        "mlp_hidden": given["n_inner"] or 4 * given["n_embd"],
        "activation": ACTIVATIONS[given["activation_function"]],
    }


def activation_name(activation: str) -> str:
    """What the library calls an activation.

    Raises:
      UserError: if it has no such.
    """
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if activation not in names:
        raise UserError(f"this GPT-2 cannot be written for transformers: its activation is {activation!r}")
    return names[activation]


def untied(what: str, tensors: Mapping[str, Any], head: str, table: str) -> dict[str, Any]:
    """Tensors without the head.

    Raises:
      UserError: if it is there and is not the table of embeddings.
    """
    if head in tensors and table in tensors and not np.array_equal(tensors[head], tensors[table]):
        raise UserError(f"{what} cannot be converted: its head is not its table of embeddings, as ours is")
    return {name: array for name, array in tensors.items() if name != head}


def read_gpt2(origin: Origin) -> Converted:
    """Reads what `GPT2LMHeadModel.save_pretrained` wrote, or the published files, with the tokenizer if they have one.

    Raises:
      UserError: if files are missing or say something else. A tokenizer that cannot be used is left out.
    """
    what = "this GPT-2"
    fields = {"name": "gpt2", **gpt2_fields(what, origin.json("config.json"))}
    tensors = {
        re.sub(rf"^{re.escape(_PREFIX)}", "", name): array
        for name, array in read_weights(origin, WEIGHTS, IGNORED).items()
    }
    tensors = untied(what, tensors, _HEAD, "wte.weight")
    fields |= stored_dtype(tensors)
    params = LAYOUT.read_deferred(create_model(**fields), tensors)["params"]
    config = {"objective": "", "models": {"gpt2": fields}}
    try:
        tokenizer = _read_tokenizer(origin, fields["text_vocab_size"])
    except UserError as error:
        return Converted(config, {"gpt2": params}, notes=(f"its tokenizer is left out: {error}",))
    return Converted(config, {"gpt2": params}, tokenizer=tokenizer)


def _read_tokenizer(origin: Origin, size: int) -> Tokenizer | None:
    """The tokenizer of a network of `size` ids, of tokenizer.json or of vocab.json and merges.txt; None without.

    Raises:
      UserError: if it cannot be read, has more ids, or does not end texts.
    """
    whole, vocabulary, merges = (origin.find(name) for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole is not None:
        tokenizer = Tokenizer.load(whole)
    elif vocabulary is not None and merges is not None:
        tokenizer = Tokenizer.from_gpt2_vocabulary(vocabulary, merges, size)
    else:
        return None
    if tokenizer.end_id is None or tokenizer.vocab_size > size:
        raise UserError(
            f"it has {tokenizer.vocab_size} ids, the network {size}, and its texts end with {tokenizer.end_id}"
        )
    return tokenizer


def gpt2_config(model: Any) -> dict[str, Any]:
    """The keys of a config that say what a network computes.

    Args:
      model: has the fields of a `GPT2`.

    Raises:
      UserError: if the library has no such network.
    """
    return {
        "vocab_size": model.text_vocab_size,
        "n_positions": model.length,
        "n_embd": model.width,
        "n_layer": model.depth,
        "n_head": model.heads,
        "n_inner": model.mlp_hidden,
        "activation_function": activation_name(model.activation),
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": model.text_vocab_size - 1,
        "eos_token_id": model.text_vocab_size - 1,
    }


def gpt2_files(model: GPT2, params: Tree) -> Files:
    """What `GPT2LMHeadModel.from_pretrained` reads; tensors are made one by one.

    Raises:
      UserError: if the library has no such network.
    """
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **gpt2_config(model)}
    config |= {"dtype": written_dtype(params)}
    tensors = LAYOUT.write_deferred({"params": params})
    return {"config.json": config, **in_shards({f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()})}
