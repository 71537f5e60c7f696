"""Llama and Llama Vision as Meta publishes them: params.json beside consolidated.00.pth, in and out.

The traps of that format: rotary positions turn neighboring entries of a head, and ours entries half a head apart;
params.json does not tell the factor by which rotary frequencies are scaled (8, and 32 of the small models, whose heads
are their tables of embeddings); the image encoder's sizes stand in the code alone; positions of tiles are one grid, of
which each canvas has a corner; large models are cut in parts, each tensor along an axis of its own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cli.errors import UserError
from models import create_model
from models.layers.tile_positions import canvases
from models.llama import Llama
from models.vision_adapter import VisionAdapter
from weights.files.fields import IDLE, Field, fixed, flag, read_fields, real, whole
from weights.files.layout import Form, Layout, Rule, linear
from weights.files.origin import Origin, WeightsFile, learned, peek_json, read_weights
from weights.files.tensors import Deferred, read_tensors
from weights.formats.contract import Converted, Files, Format, Network, Tree
from weights.formats.llama_runs import text_run
from weights.formats.transformers_llama import stored_dtype

_PARAMS = "params.json"
_FIRST = ("consolidated.safetensors", "consolidated.pth", "consolidated.00.pth")
_IGNORED = r".*(rope\.freqs|\.freqs_cis)"
_IMAGE_TOKEN, _EXTRA_TOKENS, _IMAGE_HEADS, _PATCH = 128256, 8, 16, 14
_FEATURES = (3, 7, 15, 23, 30)
_TABLE: dict[str, Field] = {
    "dim": whole(),
    "n_layers": whole(high=1024),
    "n_heads": whole(),
    "n_kv_heads": whole(None).or_null(),
    "vocab_size": whole(),
    "ffn_dim_multiplier": IDLE,  # the tensors tell
    "multiple_of": IDLE,
    "norm_eps": fixed(1e-5),
    "rope_theta": real(500000.0, low=0, above=True),
    "use_scaled_rope": flag(False),
    "max_batch_size": IDLE,
    "max_seq_len": IDLE,
    "model_parallel_size": IDLE,
    "vision_chunk_size": whole(0, low=0),
    "vision_max_num_chunks": whole(4, high=64),
    "vision_num_cross_attention_layers": whole(0, low=0),
}


def _neighbors(array: np.ndarray) -> np.ndarray:
    """[..., K] whose entries i and i + K / 2 are turned together -> 2i and 2i + 1."""
    return array.reshape(*array.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(array.shape)


def _halves(array: np.ndarray) -> np.ndarray:
    """The way back."""
    return array.reshape(*array.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(array.shape)


_DENSE = linear()
_TURNED = Form(
    outward=lambda array: _DENSE.outward(_neighbors(array)),
    inward=lambda array, shape: _halves(_DENSE.inward(array, shape)),
)
# [h, w, in, out] <-> the matrix of an unfolded patch, channels first.
_PATCHES = Form(
    outward=lambda array: array.transpose(3, 2, 0, 1).reshape(array.shape[3], -1),
    inward=lambda array, shape: array.reshape(shape[3], shape[2], *shape[:2]).transpose(2, 3, 1, 0),
)
# [T, T, D] <-> [T, T, 1, D].
_ONE = Form(outward=lambda array: array[:, :, None], inward=lambda array, shape: array.reshape(shape))


def _layer(ours: str, theirs: str, turned: bool) -> tuple[Rule, ...]:
    """Rules of a layer of text: the language model's own are turned by positions, those that look at pictures not."""
    query, key = (_TURNED, _TURNED) if turned else (_DENSE, _DENSE)
    return (
        Rule(rf"{ours}/attention_norm/scale", rf"{theirs}.attention_norm.weight"),
        Rule(rf"{ours}/attention/query/kernel", rf"{theirs}.attention.wq.weight", query),
        Rule(
            rf"{ours}/attention/key_value/kernel",
            (rf"{theirs}.attention.wk.weight", rf"{theirs}.attention.wv.weight"),
            (key, _DENSE),
        ),
        Rule(rf"{ours}/attention/out/kernel", rf"{theirs}.attention.wo.weight", linear(inputs=2)),
        Rule(rf"{ours}/mlp_norm/scale", rf"{theirs}.ffn_norm.weight"),
        Rule(
            rf"{ours}/mlp/up_gate/kernel",
            (rf"{theirs}.feed_forward.w3.weight", rf"{theirs}.feed_forward.w1.weight"),
            axis=2,
        ),
        Rule(rf"{ours}/mlp/down/kernel", rf"{theirs}.feed_forward.w2.weight"),
    )


def _language(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(rf"{ours}embedding/embedding", f"{theirs}tok_embeddings.weight"),
        *_layer(rf"{ours}blocks_(\d+)", rf"{theirs}layers.\1", turned=True),
        Rule(rf"{ours}final_norm/scale", f"{theirs}norm.weight"),
        Rule(rf"{ours}text_head/kernel", f"{theirs}output.weight"),
    )


def _both(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A weight and a bias."""
    return Rule(rf"{ours}/(kernel|scale)", rf"{theirs}.weight"), Rule(rf"{ours}/bias", rf"{theirs}.bias")


def _resblocks(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_both(rf"{ours}/attention_norm", rf"{theirs}.ln_1"),
        Rule(
            rf"{ours}/attention/query_key_value/kernel",
            tuple(rf"{theirs}.attn.w{name}.weight" for name in "qkv"),
        ),
        Rule(rf"{ours}/attention/out/kernel", rf"{theirs}.attn.wo.weight", linear(inputs=2)),
        *_both(rf"{ours}/mlp_norm", rf"{theirs}.ln_2"),
        *_both(rf"{ours}/mlp/up", rf"{theirs}.mlp.c_fc"),
        *_both(rf"{ours}/mlp/down", rf"{theirs}.mlp.c_proj"),
        Rule(rf"{ours}/attention_gate", rf"{theirs}.gate_attn"),
        Rule(rf"{ours}/mlp_gate", rf"{theirs}.gate_ffn"),
    )


_LOOKS, _CROSS, _ENCODER = r"cross_blocks_(\d+)", r"text_model.cross_attention_layers.\1", "vision_model.vision_encoder"
_LAYOUTS = {
    Llama: Layout(what="this Llama in Meta's layout", rules=_language("", ""), leaves={}),
    VisionAdapter: Layout(
        what="this Llama Vision in Meta's layout",
        rules=(
            *_language("language/", "text_model."),
            Rule("extra_embedding/embedding", "text_model.learnable_embedding.weight"),
            *_layer(_LOOKS, _CROSS, turned=False),
            Rule(rf"{_LOOKS}/attention/query_norm/scale", rf"{_CROSS}.attention.q_norm.weight"),
            Rule(rf"{_LOOKS}/attention/key_norm/scale", rf"{_CROSS}.attention.k_norm.weight"),
            Rule(rf"{_LOOKS}/attention_gate", rf"{_CROSS}.gate_attn"),
            Rule(rf"{_LOOKS}/mlp_gate", rf"{_CROSS}.gate_ffwd"),
            *_both("projection", "vision_model.vision_projection"),
            Rule("encoder/patch/kernel", f"{_ENCODER}.conv1._linear.weight", _PATCHES),
            Rule("encoder/class_embedding", f"{_ENCODER}.class_embedding"),
            Rule("encoder/position/embedding", f"{_ENCODER}.positional_embedding"),
            Rule("encoder/position_gate", f"{_ENCODER}.gated_positional_embedding_gate"),
            Rule("encoder/tile_position/grid", f"{_ENCODER}.gated_positional_embedding"),
            Rule("encoder/first_tile/grid", f"{_ENCODER}.pre_tile_pos_embed.embedding", other=_ONE),
            Rule("encoder/first_tile_gate", f"{_ENCODER}.pre_tile_pos_embed.gate"),
            Rule("encoder/last_tile/grid", f"{_ENCODER}.post_tile_pos_embed.embedding", other=_ONE),
            Rule("encoder/last_tile_gate", f"{_ENCODER}.post_tile_pos_embed.gate"),
            *_both("encoder/first_norm", f"{_ENCODER}.ln_pre"),
            *_both("encoder/last_norm", f"{_ENCODER}.ln_post"),
            *_resblocks(r"encoder/blocks_(\d+)", rf"{_ENCODER}.transformer.resblocks.\1"),
            *_resblocks(r"encoder/global_blocks_(\d+)", rf"{_ENCODER}.global_transformer.resblocks.\1"),
        ),
        leaves={},
    ),
}


def fusion_schedule(layers: int, cross: int) -> tuple[int, ...]:
    """The language model's layers before which `cross` layers stand: every so many, the last one among them."""
    return tuple(sorted(range(layers)[:: -max(1, layers // cross)][:cross])) if cross else ()


def meta_fields(params: Mapping[str, Any], tensors: Mapping[str, Any], factor: str = "") -> dict[str, Any]:
    """Reads params.json as {"name", fields} of a `Llama` or a `VisionAdapter`.

    Args:
      params: the document.
      tensors: whole ones, of which some tell sizes.
      factor: by which rotary frequencies are scaled, where it is known; "" for 32 of a tied head, 8 of others.

    Raises:
      UserError: if ours cannot compute what it describes.
    """
    given = read_fields("this Llama", params, _TABLE)
    vision = bool(given["vision_chunk_size"])
    text = "text_model." if vision else ""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = tuple(tensors[name].shape) if name in tensors else None
        if found is None or len(found) != rank or 0 in found:
            raise UserError(f"these are not the weights of {_PARAMS}: {name} is {found or 'missing'}")
        return found

    table, head = f"{text}tok_embeddings.weight", f"{text}output.weight"
    tied = not vision and (head not in tensors or _same(tensors[table], tensors[head]))
    heads = given["n_heads"]
    fields: dict[str, Any] = {
        "name": "vision_adapter" if vision else "llama",
        "text_vocab_size": given["vocab_size"],
        "width": given["dim"],
        "depth": given["n_layers"],
        "heads": heads,
        "kv_heads": given["n_kv_heads"] or heads,
        "mlp_hidden": shape(f"{text}layers.0.feed_forward.w1.weight", 2)[0],
        "rope_theta": float(given["rope_theta"]),
        "rope_factor": _factor(factor, tied) if given["use_scaled_rope"] else 1.0,
        "tied": tied,
    }
    if heads % fields["kv_heads"] or given["dim"] % heads:
        raise UserError(f"{_PARAMS} cannot be converted: {heads} heads divide neither its width nor its heads of keys")
    if not vision:
        return fields
    cross = given["vision_num_cross_attention_layers"]
    if not 0 < cross <= given["n_layers"]:
        raise UserError(f"{_PARAMS} cannot be converted: vision_num_cross_attention_layers is {cross}")
    width = shape(f"{_ENCODER}.class_embedding", 1)[0]
    if (wide := shape("vision_model.vision_projection.weight", 2)[1]) != width * (1 + len(_FEATURES)):
        raise UserError(f"these weights cannot be converted: pictures have {wide} features, not {width} x 6")
    return {
        **fields,
        "cross_layers": fusion_schedule(given["n_layers"], cross),
        "image_token": _IMAGE_TOKEN if given["vocab_size"] == _IMAGE_TOKEN else given["vocab_size"],
        "extra_tokens": _EXTRA_TOKENS,
        "tile_size": given["vision_chunk_size"],
        "patch_size": _PATCH,
        "image_width": width,
        "image_heads": _IMAGE_HEADS,
        "image_layers": _count(tensors, rf"{_ENCODER}.transformer.resblocks."),
        "global_layers": _count(tensors, rf"{_ENCODER}.global_transformer.resblocks."),
        "image_mlp_ratio": shape(f"{_ENCODER}.transformer.resblocks.0.mlp.c_fc.weight", 2)[0] / width,
        "max_tiles": given["vision_max_num_chunks"],
        "feature_layers": _FEATURES,
        "tile_tables": "grid",
    }


def read_meta(origin: Origin, rope_factor: str = "", prompts: str = "") -> Converted:
    """Reads a folder as Meta publishes it.

    Raises:
      UserError: if files are missing or say something else.
    """
    params = origin.json(_PARAMS)
    parts = _read_parts(origin)
    fields = meta_fields(params, _joined(parts), rope_factor)
    if fields["tied"]:
        parts = [{name: array for name, array in part.items() if name != "output.weight"} for part in parts]
    fields |= stored_dtype(parts[0])
    model = create_model(**fields)
    tree = _LAYOUTS[type(model)].read_deferred(model, _joined(parts))["params"]
    pictures = {"image_size": "tile_size", "max_tiles": "max_tiles"} if isinstance(model, VisionAdapter) else {}
    data = {key: getattr(model, field) for key, field in pictures.items()}
    return text_run(origin, fields, tree, data, prompts)


def write_meta(network: Network) -> Files:
    """params.json and the tensors, whole and made one by one; Meta's code reads them as one part.

    Raises:
      UserError: if Meta's code cannot compute what the network does.
    """
    model, params = network.model, network.params
    if model.rope_factor not in (1.0, 8.0, 32.0) or model.head_dim not in (None, model.width // model.heads):
        what = "its rotary factor or heads are none of Llama's"
        raise UserError(f"this network cannot be written for Meta's code: {what}")
    document = {
        "dim": model.width,
        "n_layers": model.depth,
        "n_heads": model.heads,
        "n_kv_heads": model.kv_heads,
        "vocab_size": model.text_vocab_size,
        "norm_eps": 1e-5,
        "rope_theta": model.rope_theta,
        "use_scaled_rope": model.rope_factor != 1.0,
    }
    if isinstance(model, VisionAdapter):
        document |= _vision_document(model)
        params = with_grids(model, params)
    tensors: dict[str, Any] = dict(_LAYOUTS[type(model)].write_deferred({"params": params}))
    if model.tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    return {_PARAMS: document, _FIRST[0]: tensors}


def with_grids(model: VisionAdapter, params: Tree) -> Tree:
    """Parameters whose positions of tiles are grids, of a network that has tables of canvases.

    Raises:
      UserError: if the tables do not come from a grid.
    """
    if model.tile_tables == "grid":
        return params
    encoder = dict(params["encoder"])
    for name in ("tile_position", "first_tile", "last_tile"):
        encoder[name] = {"grid": _grid_of(name, np.asarray(encoder[name]["embedding"]), model.max_tiles)}
    return {**params, "encoder": encoder}


def _grid_of(name: str, tables: np.ndarray, side: int) -> np.ndarray:
    """The grid of which each canvas's table [T ...] is a corner; zeros where no canvas reaches."""
    grid = np.zeros((side, side, *tables.shape[2:]), tables.dtype)
    for (rows, columns), table in zip(canvases(side), tables[1:], strict=True):
        grid[:rows, :columns] = table[: rows * columns].reshape(rows, columns, *tables.shape[2:])
    fits = not tables[0].any()
    for (rows, columns), table in zip(canvases(side), tables[1:], strict=True):
        corner = grid[:rows, :columns].reshape(rows * columns, *tables.shape[2:])
        fits &= np.array_equal(corner, table[: rows * columns]) and not table[rows * columns :].any()
    if not fits:
        raise UserError(
            f"this network cannot be written for Meta's code: its {name} has a table of each canvas that is no corner "
            "of one grid, as training makes them; write it for transformers, or train with tile_tables='grid'"
        )
    return grid


def _vision_document(model: VisionAdapter) -> dict[str, Any]:
    """What params.json says of pictures; raises UserError where Meta's code has other numbers."""
    published = {
        "patch_size": _PATCH,
        "image_heads": _IMAGE_HEADS,
        "feature_layers": _FEATURES,
        "extra_tokens": _EXTRA_TOKENS,
        "cross_layers": fusion_schedule(model.depth, len(model.cross_layers)),
        "tied": False,
    }
    other = [f"{name} {getattr(model, name)}" for name, value in published.items() if getattr(model, name) != value]
    if other:
        raise UserError(f"this network cannot be written for Meta's code, which has another {', '.join(other)}")
    return {
        "vision_chunk_size": model.tile_size,
        "vision_max_num_chunks": model.max_tiles,
        "vision_num_cross_attention_layers": len(model.cross_layers),
    }


def _read_parts(origin: Origin) -> list[dict[str, Any]]:
    """The tensors of each part of a network."""
    if isinstance(origin, WeightsFile):
        raise UserError(f"{origin.describe()} is one file; give the folder with {_PARAMS} and consolidated.00.pth")
    parts = [read_weights(origin, _FIRST, _IGNORED)]
    while (path := origin.find(f"consolidated.{len(parts):02}.pth")) is not None:
        parts.append(learned(origin, str(path), read_tensors(path), _IGNORED))
    if wrong := [name for name in parts[0] if any(name not in part for part in parts)]:
        raise UserError(f"{origin.describe()} has parts of which some lack {wrong[0]}; fetch them again")
    return parts


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whole tensors of parts: each is cut along one axis, which its name tells, or the same in all."""
    if len(parts) == 1:
        return dict(parts[0])
    joined: dict[str, Any] = {}
    for name, array in parts[0].items():
        axis = next((axis for pattern, axis in _CUT if re.search(pattern, name)), None)
        if axis is None or axis >= array.ndim:
            joined[name] = array
            continue
        shape = tuple(size * (len(parts) if place == axis else 1) for place, size in enumerate(array.shape))

        def make(name: str = name, axis: int = axis) -> np.ndarray:
            return np.concatenate([np.asarray(part[name]) for part in parts], axis=axis)

        joined[name] = Deferred(shape, array.dtype, make)
    return joined


# The axis along which tensors are cut, by what their names end in; all others are whole in every part.
_CUT = (
    (r"\.(wq|wk|wv|w1|w3)\.weight$", 0),
    (r"(^|\.)(output|tok_embeddings)\.weight$", 0),
    (r"\.(c_fc|vision_projection)\.(weight|bias)$", 0),
    (r"\.conv1\._linear\.weight$", 0),
    (r"\.(wo|w2|c_proj)\.weight$", 1),
)


def _same(one: Any, other: Any) -> bool:
    return one.shape == other.shape and np.array_equal(np.asarray(one), np.asarray(other))


def _factor(factor: str, tied: bool) -> float:
    if not factor:
        return 32.0 if tied else 8.0
    try:
        value = float(factor)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise UserError(f"--rope_factor={factor} is no factor of rotary positions; it is 8, or 32 of the small models")
    return value


def _count(tensors: Mapping[str, Any], prefix: str) -> int:
    """How many numbers stand behind a prefix."""
    found = {match[1] for name in tensors if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
    return len(found)


def _recognizes(origin: Origin) -> bool:
    path = origin.find(_PARAMS)
    return path is not None and {"dim", "n_layers"} <= peek_json(path).keys()


FORMAT = Format(
    name="meta",
    networks=("llama", "vision_adapter"),
    inputs="a Llama or Llama Vision as Meta publishes it, params.json beside consolidated.00.pth",
    outputs="params.json and consolidated.safetensors; torch.save its tensors as consolidated.00.pth for Meta's code",
    recognizes=_recognizes,
    read=read_meta,
    write=write_meta,
    options={
        "rope_factor": "of a Llama: the factor of rotary positions, if it is neither 8 nor 32 of a tied head",
        "prompts": "of a Llama with tokenizer.json: `turns` of an instructed one, `texts` of another (default: what a "
        "generation_config.json or a chat template tells, else texts)",
    },
)
