"""minDALL-E (github.com/kakaobrain/minDALL-E): its transformer and VQGAN to a run, and the transformer back.

The published archive holds `config.yaml`, `stage1_last.ckpt`, a VQGAN in the layout of taming-transformers, and
`stage2_last.ckpt`, the transformer, which reads captions without a start token, pads them with one token for all
positions, and has a learned position for each image token and heads without a bias.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cli.errors import UserError
from cli.text_files import read_text
from data.tokenizer import Tokenizer
from models import create_model
from models.dalle import Dalle
from weights.files.fields import IDLE, Field, fixed, flag, group, read_fields, whole, word
from weights.files.layout import Layout, Rule, Tensors, Tree, linear
from weights.files.origin import Origin, WeightsFile, read_weights, without_keys
from weights.formats.compvis import autoencoder_from_compvis, quantized_from_compvis
from weights.formats.contract import Converted, Files, Format, Network
from weights.formats.runs import dalle_run
from weights.formats.taming import TRUNK, vqgan_fields

CONFIG = "config.yaml"
WEIGHTS = ("stage2_last.ckpt", "stage2_last.safetensors")
VQGAN = ("stage1_last.ckpt", "stage1_last.safetensors")
TOKENIZER = ("tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt")
_HEAD_WIDTH = 64  # of the published network, where no config tells

_TABLE: dict[str, Field] = {
    "stage2": group(
        {
            "type": word("transformer1d", ("transformer1d",)),
            "vocab_size_txt": whole(16384),
            "vocab_size_img": whole(16384),
            "use_cls_cond": fixed(None),
            "hparams": group(
                {
                    "embed_dim": whole(1536),
                    "n_layers": whole(42, high=1024),
                    "n_heads": whole(24),
                    "n_dense_layers": whole(42, high=1024),
                    "ctx_len_img": whole(256),
                    "ctx_len_txt": whole(64),
                    "gelu_use_approx": flag(False),
                    **{key: fixed(True) for key in ("mlp_bias", "attn_bias", "use_head_txt")},
                    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), IDLE),
                    "n_classes": fixed(None),
                },
                {},
            ),
        },
        {},
    ),
    "stage1": group(
        {
            "type": word("vqgan", ("vqgan",)),
            "embed_dim": whole(256),
            "n_embed": whole(16384),
            "hparams": group(TRUNK, {}),
        },
        {},
    ),
    **dict.fromkeys(("dataset", "optimizer", "experiment"), IDLE),
}
_SHORT = {"text": "txt", "image": "img"}
_LAYER, _THEIRS = r"blocks_(\d+)", r"blocks.\1"

LAYOUT = Layout(
    what="this transformer in the layout of minDALL-E",
    rules=(
        Rule(r"(text|image)_embedding/(\w+)", lambda match: f"tok_emb_{_SHORT[match[1]]}.{match[2]}"),
        Rule(r"(text|image)_position/(\w+)", lambda match: f"pos_emb_{_SHORT[match[1]]}.{match[2]}"),
        Rule(r"(text|image)_head/(\w+)", lambda match: f"head_{_SHORT[match[1]]}.{match[2]}"),
        Rule(rf"{_LAYER}/attention_norm/(\w+)", rf"{_THEIRS}.ln1.\2"),
        Rule(
            rf"{_LAYER}/attention/query_key_value/(\w+)",
            tuple(rf"{_THEIRS}.attn.{name}.\2" for name in ("query", "key", "value")),
        ),
        Rule(rf"{_LAYER}/attention/out/(\w+)", rf"{_THEIRS}.attn.proj.\2", linear(inputs=2)),
        Rule(rf"{_LAYER}/mlp_norm/(\w+)", rf"{_THEIRS}.ln2.\2"),
        Rule(rf"{_LAYER}/mlp/up/(\w+)", rf"{_THEIRS}.mlp.0.\2"),
        Rule(rf"{_LAYER}/mlp/down/(\w+)", rf"{_THEIRS}.mlp.2.\2"),
        Rule(r"final_norm/(\w+)", r"ln_f.\1"),
    ),
    ignored=r"blocks\.\d+\.attn\.mask",
)


def transformer_fields(config: Any) -> dict[str, Any]:
    """Reads config.yaml as {"name": "dalle", fields of `models.dalle.Dalle`}.

    Raises:
      UserError: if ours cannot compute that network; names the keys.
    """
    stage = read_fields("this minDALL-E", config, _TABLE)["stage2"]
    given = stage["hparams"]
    if given["n_dense_layers"] != given["n_layers"]:
        raise UserError(
            f"this minDALL-E cannot be converted: n_dense_layers is {given['n_dense_layers']}, "
            f"n_layers {given['n_layers']}; they must be equal"
        )
    return _fields(
        stage["vocab_size_txt"],
        stage["vocab_size_img"],
        given["ctx_len_txt"],
        given["ctx_len_img"],
        given["embed_dim"],
        given["n_layers"],
        given["n_heads"],
        "quick_gelu" if given["gelu_use_approx"] else "gelu",
    )


def transformer_fields_of_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tells {"name": "dalle", fields} from the shapes of a state dict, with heads and GELU as published.

    Raises:
      UserError: if a tensor that says a size is missing.
    """
    names = ("tok_emb_txt.weight", "tok_emb_img.weight", "pos_emb_txt.weight", "pos_emb_img.weight")
    if missing := [name for name in names if tensors.get(name) is None or tensors[name].ndim != 2]:
        raise UserError(f"these are not the weights of minDALL-E's transformer: there is no {', '.join(missing)}")
    layers = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    width = tensors[names[0]].shape[1]
    if width % _HEAD_WIDTH:
        raise UserError(f"shapes do not tell the heads of a width of {width}; put {CONFIG} beside the weights")
    text_ids, codes, text, image = (len(tensors[name]) for name in names)
    return _fields(text_ids, codes, text, image, width, len(layers), width // _HEAD_WIDTH, "gelu")


def vqgan_fields_of(config: Any) -> dict[str, Any]:
    """Reads config.yaml as {"name": "autoencoder_vq", fields} of its image tokenizer.

    Raises:
      UserError: if ours cannot compute that network; names the keys.
    """
    stage = read_fields("this minDALL-E", config, _TABLE)["stage1"]
    return vqgan_fields("this minDALL-E", stage["hparams"], stage["n_embed"], stage["embed_dim"])


def _fields(
    text_ids: int, codes: int, text: int, image: int, width: int, depth: int, heads: int, activation: str
) -> dict[str, Any]:
    side = math.isqrt(image)
    if side**2 != image:
        raise UserError(f"this minDALL-E cannot be converted: ctx_len_img is {image}, which is no square")
    return {
        "name": "dalle",
        "text_vocab_size": text_ids,
        "text_length": text,
        "image_vocab_size": codes,
        "image_grid": (side, side),
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": 4,
        "activation": activation,
        "attention": "full",
        "start_token": False,
        "own_pads": False,
        "image_positions": "raster",
        "head_bias": False,
    }


def transformer_config(model: Dalle) -> dict[str, Any]:
    """config.yaml of the transformer that computes what `model` does; `transformer_fields` backwards.

    Raises:
      UserError: if there is none.
    """
    height, width = model.image_grid
    wanted = {"mlp_ratio": 4, "gated_mlp": False, "attention_bias": True, "start_token": False, "own_pads": False}
    wanted |= {"image_positions": "raster", "head_bias": False, "layer_types": ("full",) * model.depth}
    wanted |= {"image_grid": (height, height), "head_dim": None}
    problems = [
        f"its {field} is {getattr(model, field)!r}, theirs {value!r}"
        for field, value in wanted.items()
        if getattr(model, field) != value
    ]
    if model.activation not in ("gelu", "quick_gelu"):
        problems.append(f"its activation is {model.activation!r}, theirs gelu or quick_gelu")
    if problems:
        raise UserError(f"this DALL-E cannot be written for minDALL-E: {'; '.join(problems)}")
    hyperparameters = {
        "embed_dim": model.width,
        "n_layers": model.depth,
        "n_heads": model.heads,
        "n_dense_layers": model.depth,
        "ctx_len_img": height * width,
        "ctx_len_txt": model.text_length,
        "gelu_use_approx": model.activation == "quick_gelu",
        "mlp_bias": True,
        "attn_bias": True,
    }
    sizes = {"vocab_size_txt": model.text_vocab_size, "vocab_size_img": model.image_vocab_size}
    return {"stage2": {"type": "transformer1d", **sizes, "hparams": hyperparameters}}


def from_mindall_e(model: Dalle, tensors: Mapping[str, np.ndarray]) -> Tree:
    """Converts the state dict of the transformer to the parameters of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    return LAYOUT.read(model, tensors)["params"]


def to_mindall_e(model: Dalle, params: Tree) -> Tensors:
    """Converts parameters to the transformer's state dict, float32.

    Raises:
      UserError: if minDALL-E cannot compute what `model` does.
    """
    transformer_config(model)
    return LAYOUT.write({"params": params})


def _read(origin: Origin) -> Converted:
    tensors = read_weights(origin, WEIGHTS, LAYOUT.ignored)
    stages = {
        stage: {name.removeprefix(stage): array for name, array in tensors.items() if name.startswith(stage)}
        for stage in ("stage1.", "stage2.")
    }
    if stages["stage2."]:  # a training run's, of both stages
        tensors = stages["stage2."]
    path = origin.find(CONFIG)
    config = None if path is None else _read_yaml(origin, path)
    fields = transformer_fields_of_tensors(tensors) if config is None else transformer_fields(config)
    vqgan = stages["stage1."]
    if not vqgan and origin.find(*VQGAN) is not None:
        vqgan = read_weights(origin, VQGAN)
    tokenizer, notes = _read_tokenizer(origin, fields["text_vocab_size"])
    image_tokenizer = None
    if not vqgan:
        notes = (f"there is no {VQGAN[0]}, its image tokenizer: it makes tokens and not pictures", *notes)
    elif config is None:
        image_tokenizer = quantized_from_compvis(vqgan, fields["image_grid"])
    else:
        told = vqgan_fields_of(config)
        image_tokenizer = (told, autoencoder_from_compvis(create_model(**told), vqgan))
    return dalle_run(fields, from_mindall_e(create_model(**fields), tensors), image_tokenizer, tokenizer, notes)


def _read_tokenizer(origin: Origin, ids: int) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """The tokenizer of captions, if the archive has it; and a note if it has none.

    Raises:
      UserError: if it is none, or has more ids than the transformer.
    """
    vocabulary, merges = (origin.find(name) for name in TOKENIZER)
    if vocabulary is None or merges is None:
        return None, (f"there is no {TOKENIZER[0]} with its merges, its tokenizer: it takes no captions",)
    tokenizer = Tokenizer.from_letter_vocabulary(vocabulary, merges, unknown="[UNK]", pad="[PAD]")
    if tokenizer.vocab_size > ids:
        raise UserError(f"{vocabulary} has {tokenizer.vocab_size} ids, and the transformer {ids}; give its own")
    return tokenizer, ()


class _WithoutAliases(yaml.SafeLoader):
    """Plain values alone: references among them make a small file as large as it likes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to parts of itself")
        return super().compose_node(parent, index)


def _read_yaml(origin: Origin, path: Path) -> Any:
    """Reads the config without the keys that a user lets pass; UserError if it is no YAML."""
    try:
        return without_keys(yaml.load(read_text(path, "config"), _WithoutAliases), origin.leniency.keys)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())}); fetch it again") from error


def _write(network: Network) -> Files:
    # JSON is YAML.
    config, tensors = transformer_config(network.model), to_mindall_e(network.model, network.params)
    return {CONFIG: config, WEIGHTS[1]: tensors}


FORMAT = Format(
    name="mindall_e",
    networks=("dalle",),
    inputs=f"the folder of the published archive, or {WEIGHTS[0]} alone, which makes no pictures and takes no captions",
    outputs=f"Transformer1d(...).load_state_dict with the hparams of {CONFIG} and {WEIGHTS[1]}",
    recognizes=lambda origin: not isinstance(origin, WeightsFile) and origin.find(*WEIGHTS) is not None,
    read=_read,
    write=_write,
)
