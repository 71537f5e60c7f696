"""DALL-E as the dalle_pytorch package trains it (github.com/lucidrains/DALLE-pytorch): `dalle.pt` to a run, and back.

Such a file is a dict: "hparams" are arguments of the class `DALLE`, "weights" its state dict, in which the image
tokenizer's tensors lie under "vae.". "vae_params" are arguments of the package's own discrete VAE; they are None where
OpenAI's discrete VAE or a VQGAN of taming-transformers (under "vae.model.") makes the tokens.

Both transformers are the same computation, arranged otherwise:

    theirs                                              ours
    a start token, which is caption id 0                a table of its own: row 0 of theirs, and its position
    a factor for each channel of a layer's output       multiplied into the output projection; 1 on the way back
    one head over both vocabularies, logits masked      a head for each
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import UserError
from models import create_model
from models.dalle import Dalle
from weights.files.fields import IDLE, Field, fixed, flag, read_fields, several, whole, word
from weights.files.layout import Layout, Rule, Tensors, Tree, linear
from weights.files.origin import Origin, WeightsFile, learned, without_keys
from weights.files.tensors import TORCH_SUFFIXES, read_tensors, read_with
from weights.files.torch_pickle import read_pickle, tensors_of
from weights.formats import dall_e, dalle_pytorch_dvae
from weights.formats.compvis import quantized_from_compvis
from weights.formats.contract import Converted, Files, Format, Network
from weights.formats.runs import dalle_run, read_unframed

HYPERPARAMETERS = "hparams.json"
WEIGHTS = "dalle.safetensors"
_ENTRIES = ("hparams", "vae_params", "weights")

# Their attention -> our layer type.
_ATTENTION = {"full": "full", "axial_row": "own_row", "axial_col": "column", "conv_like": "conv"}
_VQGAN = "model."  # before names of an image tokenizer that is one
_KERNEL = 5  # of their "conv_like"

_TABLE: dict[str, Field] = {
    "num_text_tokens": whole(10000),
    "text_seq_len": whole(256),
    "dim": whole(),
    "depth": whole(high=1024),
    "heads": whole(8),
    "dim_head": whole(64),
    "attn_types": several(word(choices=tuple(_ATTENTION)), ("full",)).or_null(("full",)),
    "share_input_output_emb": flag(False),
    # What ours does not compute.
    **{key: fixed(False) for key in ("reversible", "stable", "sandwich_norm", "shift_tokens", "rotary_emb")},
    "sparse_attn": fixed(False, None),
    # Of training, or of how attention is computed; what layers share lies in each of them.
    **dict.fromkeys(("loss_img_weight", "attn_dropout", "ff_dropout", "optimize_for_inference"), IDLE),
    **dict.fromkeys(("shared_attn_ids", "shared_ff_ids"), IDLE),
}

# A joint projection [D, 3, heads, width] without a bias <-> [3 heads width, D]: as any dense layer.
_OUT = linear(inputs=2)
_LAYER, _THEIRS = r"blocks_(\d+)", r"layers.\1"

LAYOUT = Layout(
    what="this DALL-E in the layout of dalle_pytorch",
    rules=(
        Rule(r"(bos|text_position|row_position|column_position)/embedding", r"\1"),
        Rule(r"(text|image)_embedding/embedding", r"\1_emb"),
        Rule(rf"{_LAYER}/attention_norm/(\w+)", rf"{_THEIRS}.0.norm.\2"),
        Rule(rf"{_LAYER}/attention/query_key_value/(\w+)", rf"{_THEIRS}.0.to_qkv.\2"),
        Rule(rf"{_LAYER}/attention/out/(\w+)", rf"{_THEIRS}.0.to_out.0.\2", _OUT),
        Rule(rf"{_LAYER}/mlp_norm/(\w+)", rf"{_THEIRS}.1.norm.\2"),
        Rule(rf"{_LAYER}/mlp/up_gate/(\w+)", rf"{_THEIRS}.1.net.0.\2"),
        Rule(rf"{_LAYER}/mlp/down/(\w+)", rf"{_THEIRS}.1.net.3.\2"),
        Rule(r"final_norm/(\w+)", r"to_logits.0.\1"),
        Rule(r"(text|image)_head/(\w+)", r"to_logits.1.\1.\2"),
    ),
)
_LAYER_NAME = r"transformer\.layers\.layers\.(\d+)\.([01])\.((?:fn\.)*)(.+)"
# Buffers, and what a shared embedding holds twice.
_IGNORED = r"logits_mask|transformer\.pos_emb|(text|image)_emb\.linear\..*|.*\.(mask|static_mask)"


def dalle_fields(hyperparameters: Any, image_vocab_size: int, image_grid: tuple[int, int]) -> dict[str, Any]:
    """Reads arguments of the class `DALLE` as {"name": "dalle", fields of `models.dalle.Dalle`}.

    Args:
      hyperparameters: "hparams" of a checkpoint.
      image_vocab_size: codes of the image tokenizer.
      image_grid: its tokens, (height, width).

    Raises:
      UserError: if ours cannot compute that network; names the arguments.
    """
    given = read_fields("this DALL-E of dalle_pytorch", hyperparameters, _TABLE)
    types = tuple(_ATTENTION[name] for name in given["attn_types"] or ("full",))
    return {
        "name": "dalle",
        "text_vocab_size": given["num_text_tokens"],
        "text_length": given["text_seq_len"],
        "image_vocab_size": image_vocab_size,
        "image_grid": image_grid,
        "width": given["dim"],
        "depth": given["depth"],
        "heads": given["heads"],
        "head_dim": given["dim_head"],
        "mlp_ratio": 4,
        "activation": "gelu",
        "gated_mlp": True,
        "attention_bias": False,
        "attention": types[0] if len(set(types)) == 1 else types,
        "conv_kernel": _KERNEL,
        "conv_edge": "corner",
    }


def hyperparameters(model: Dalle) -> dict[str, Any]:
    """Arguments of the class `DALLE` that computes what `model` does; `dalle_fields` backwards.

    Raises:
      UserError: if there are none.
    """
    names = {ours: theirs for theirs, ours in _ATTENTION.items()}
    wanted = {"mlp_ratio": 4, "activation": "gelu", "gated_mlp": True, "attention_bias": False, "start_token": True}
    wanted |= {"own_pads": True, "image_positions": "grid", "head_bias": True}
    if "conv" in model.layer_types:
        wanted |= {"conv_kernel": _KERNEL, "conv_edge": "corner"}
    problems = [
        f"its {field} is {getattr(model, field)!r}, theirs {value!r}"
        for field, value in wanted.items()
        if getattr(model, field) != value
    ]
    if others := sorted(set(model.layer_types) - names.keys()):
        problems.append(f"it has layers of type {', '.join(others)}, theirs are {', '.join(names)}")
    if model.image_grid[0] != model.image_grid[1]:
        problems.append(f"its image_grid is {model.image_grid}, theirs is square")
    if problems:
        raise UserError(f"this DALL-E cannot be written for dalle_pytorch: {'; '.join(problems)}")
    return {
        "num_text_tokens": model.text_vocab_size,
        "text_seq_len": model.text_length,
        "dim": model.width,
        "depth": model.depth,
        "heads": model.heads,
        "dim_head": model.head_dim or model.width // model.heads,
        "attn_types": [names[layer_type] for layer_type in model.layer_types],
        "shift_tokens": False,
        "rotary_emb": False,
    }


def from_dalle_pytorch(model: Dalle, tensors: Mapping[str, np.ndarray]) -> Tree:
    """Converts the state dict of a `DALLE`, without its image tokenizer, to the parameters of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape, or are of layers that ours has not.
    """
    given = {name: np.asarray(array) for name, array in tensors.items() if not re.fullmatch(_IGNORED, name)}
    _check_taken_apart(given, model.width)
    text_ids = model.text_ids
    head = {leaf: given.pop(f"to_logits.1.{leaf}", None) for leaf in ("weight", "bias")}
    folded: Tensors = {}
    for leaf, array in head.items():
        if array is not None:
            folded |= {f"to_logits.1.text.{leaf}": array[:text_ids], f"to_logits.1.image.{leaf}": array[text_ids:]}
    for modality in ("text", "image"):
        # An embedding that is shared with the head lies there alone.
        shared = folded.get(f"to_logits.1.{modality}.weight")
        if (table := given.pop(f"{modality}_emb.weight", shared)) is not None:
            folded[f"{modality}_emb"] = table
    if (positions := given.pop("text_pos_emb.weight", None)) is not None and "text_emb" in folded:
        folded |= {"bos": folded["text_emb"][:1] + positions[:1], "text_position": positions[1:]}
    for axis, name in enumerate(("row_position", "column_position")):
        for spelled in (f"image_pos_emb.weights.{axis}", f"image_pos_emb.weights_{axis}"):
            if (table := given.pop(spelled, None)) is not None:
                folded[name] = table.reshape(-1, table.shape[-1])
    scales: dict[str, np.ndarray] = {}
    for name, array in given.items():
        match = re.fullmatch(_LAYER_NAME, name)
        if match and match[4] == "scale":
            scales[f"layers.{match[1]}.{match[2]}."] = array.reshape(-1)
        elif match and match[4].startswith("net.") and match[3].count("fn.") > 2:
            raise UserError("this DALL-E of dalle_pytorch cannot be converted: shift_tokens is True; it must be False")
        else:
            folded[f"layers.{match[1]}.{match[2]}.{match[4]}" if match else name] = array
    for prefix, scale in scales.items():
        outs = [f"{prefix}{out}.{leaf}" for out in ("to_out.0", "net.3") for leaf in ("weight", "bias")]
        fitting = [name for name in outs if name in folded and folded[name].shape[:1] == scale.shape]
        if not any(name.endswith("weight") for name in fitting):
            raise UserError(
                f"these are not the weights of {LAYOUT.what}: transformer.layers.{prefix}scale has {scale.size} values "
                "and fits no output projection of its layer"
            )
        folded |= {name: (folded[name].T * scale).T for name in fitting}
    return LAYOUT.read(model, folded)["params"]


def to_dalle_pytorch(model: Dalle, params: Tree) -> Tensors:
    """Converts parameters to the state dict of a `DALLE`, float32, without its image tokenizer.

    Raises:
      UserError: if the package cannot compute what `model` does.
    """
    hyperparameters(model)
    folded = LAYOUT.write({"params": params})
    tensors: Tensors = {}
    for leaf in ("weight", "bias"):
        parts = [folded.pop(f"to_logits.1.{modality}.{leaf}") for modality in ("text", "image")]
        tensors[f"to_logits.1.{leaf}"] = np.concatenate(parts)
    start, positions = folded.pop("bos"), folded.pop("text_position")
    tensors["text_emb.weight"] = np.concatenate([start, folded.pop("text_emb")[1:]])
    tensors["image_emb.weight"] = folded.pop("image_emb")
    tensors["text_pos_emb.weight"] = np.concatenate([np.zeros_like(start), positions])
    tensors["image_pos_emb.weights.0"] = folded.pop("row_position")[None, :, None]
    tensors["image_pos_emb.weights.1"] = folded.pop("column_position")[None, None]
    for name, array in folded.items():
        match = re.fullmatch(r"layers\.(\d+)\.([01])\.(.+)", name)
        if match is None:
            tensors[name] = array
            continue
        layer = f"transformer.layers.layers.{match[1]}.{match[2]}"
        inside = "" if match[3].startswith("norm.") else "fn.fn." if match[3].startswith("to_") else "fn."
        tensors[f"{layer}.fn.{inside}{match[3]}"] = array
        tensors[f"{layer}.scale"] = np.ones((1, 1, model.width), np.float32)
    return tensors


def _read(origin: Origin, tokenizer: str = "") -> Converted:
    content, what = _read_checkpoint(origin)
    weights = learned(origin, what, content["weights"], _IGNORED)
    vae = {name.removeprefix("vae."): array for name, array in weights.items() if name.startswith("vae.")}
    rest = {name: array for name, array in weights.items() if not name.startswith("vae.")}
    grid, codes = _image_tokens(content["hparams"], rest)
    image_tokenizer, note = _image_tokenizer(content["vae_params"], vae, grid)
    fields = dalle_fields(content["hparams"], codes, grid)
    params = from_dalle_pytorch(create_model(**fields), rest)
    found = read_unframed(tokenizer, fields["text_vocab_size"]) if tokenizer else None
    missing = () if found else ("it has no tokenizer, which captions take: give --tokenizer",)
    return dalle_run(fields, params, image_tokenizer, found, (note,) * bool(note) + missing)


def _check_taken_apart(tensors: Mapping[str, np.ndarray], width: int) -> None:
    """Raises UserError unless the tensors that are taken apart before any others are compared have axes for that."""
    names = ("to_logits.1.weight", "text_emb.weight", "image_emb.weight", "text_pos_emb.weight")
    problems = [
        f"{name} is {tensors[name].shape}, expected (rows, {width})"
        for name in names
        if name in tensors and (tensors[name].ndim != 2 or tensors[name].shape[1] != width)
    ]
    if "to_logits.1.bias" in tensors and tensors["to_logits.1.bias"].ndim != 1:
        problems.append(f"to_logits.1.bias is {tensors['to_logits.1.bias'].shape}, expected (rows,)")
    problems += [
        f"{name} is {array.shape}, expected (..., {width})"
        for name, array in sorted(tensors.items())
        if name.startswith("image_pos_emb.") and array.shape[-1:] != (width,)
    ]
    if problems:
        raise UserError(f"these are not the weights of {LAYOUT.what}; of another shape: {', '.join(problems)}")


def _image_tokens(hparams: Any, tensors: Tensors) -> tuple[tuple[int, int], int]:
    """(grid, codes) of the image tokens that a transformer reads, by its arguments and tensors."""
    given = read_fields("this DALL-E of dalle_pytorch", hparams, _TABLE)
    _check_taken_apart(tensors, given["dim"])
    head = tensors.get("to_logits.1.weight", np.zeros(0))
    codes = len(head) - given["num_text_tokens"] - given["text_seq_len"]
    sides = [tensors[name].size // given["dim"] for name in sorted(tensors) if name.startswith("image_pos_emb.")]
    if len(sides) != 2 or codes < 1:
        what = "rotary_emb is True; it must be False" if len(sides) != 2 else "to_logits.1.weight has no row of a code"
        raise UserError(f"this DALL-E of dalle_pytorch cannot be converted, by its tensors: {what}")
    return (sides[0], sides[1]), codes


def _image_tokenizer(
    arguments: Any, tensors: Tensors, grid: tuple[int, int]
) -> tuple[tuple[dict[str, Any], Tree] | None, str]:
    """(({name, fields}, parameters), "") of what makes the image tokens; (None, why) where it did not come along."""
    if any(name.startswith("enc.blocks.") for name in tensors):
        sides = [
            {name.removeprefix(side): array for name, array in tensors.items() if name.startswith(side)}
            for side in ("enc.", "dec.")
        ]
        fields = dall_e.dvae_fields(*sides)
        return (fields, dall_e.from_dall_e(create_model(**fields), *sides)), ""
    if any(name.startswith(_VQGAN) for name in tensors):
        vqgan = {name.removeprefix(_VQGAN): array for name, array in tensors.items() if name.startswith(_VQGAN)}
        return quantized_from_compvis(vqgan, grid), ""
    if tensors:
        return dalle_pytorch_dvae.read_dvae(arguments, tensors, grid), ""
    return None, "there is no image tokenizer: it makes tokens and not pictures"


def _read_checkpoint(origin: Origin) -> tuple[dict[str, Any], str]:
    """({"hparams", "vae_params", "weights"}, the file's name)."""
    if not isinstance(origin, WeightsFile):
        path = origin.require(WEIGHTS)
        return {"hparams": origin.json(HYPERPARAMETERS), "vae_params": None, "weights": read_tensors(path)}, str(path)

    def read(path: Path) -> Any:
        content = read_pickle(path)
        if not isinstance(content, Mapping) or any(key not in content for key in _ENTRIES):
            return None
        plain = {key: without_keys(content[key], origin.leniency.keys) for key in _ENTRIES[:2]}
        return plain | {"weights": tensors_of(content["weights"])}

    content = read_with(read, origin.path)
    if content is None:
        raise UserError(
            f"{origin.path} is no checkpoint of dalle_pytorch's DALL-E, which has {', '.join(_ENTRIES)} "
            "(its discrete VAE alone, a vae.pt, is not converted: it comes along with a dalle.pt); give its dalle.pt"
        )
    return content, str(origin.path)


def _recognizes(origin: Origin) -> bool:
    if isinstance(origin, WeightsFile):
        return origin.path.suffix in TORCH_SUFFIXES and "dalle" in origin.path.stem.lower()
    return origin.find(HYPERPARAMETERS) is not None and origin.find(WEIGHTS) is not None


def _write(network: Network) -> Files:
    return {
        HYPERPARAMETERS: hyperparameters(network.model),
        WEIGHTS: to_dalle_pytorch(network.model, network.params),
    }


FORMAT = Format(
    name="dalle_pytorch",
    networks=("dalle",),
    inputs="a dalle.pt; the image tokenizer comes along: the package's own, OpenAI's, or a VQGAN",
    outputs=f"DALLE(vae=..., **hparams).load_state_dict(..., strict=False) with {HYPERPARAMETERS} and {WEIGHTS}",
    recognizes=_recognizes,
    read=_read,
    write=_write,
    options={"tokenizer": "of captions: CLIP's vocabulary, or a tokenizer.json"},
)
