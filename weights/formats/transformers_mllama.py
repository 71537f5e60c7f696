"""Llama 3.2 Vision as the transformers library has it (`MllamaForConditionalGeneration`), in and out.

The traps of that format: `num_hidden_layers` counts both kinds of layers and `cross_attention_layers` are numbers among
both, while ours count the language model's own; names on the hub and in memory differ (`language_model.model.` and
`model.language_model.`); the embeddings of the extra tokens are the last rows of the table of all; feature layers are
those whose input the weights were trained with, and later versions of the library take their output.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from cli.errors import UserError
from models import create_model
from models.clip import IMAGE_MEAN, IMAGE_STD
from models.layers.tile_positions import canvases, spread_grid
from models.vision_adapter import VisionAdapter
from weights.files.fields import IDLE, Field, fixed, read_fields, real, several, whole
from weights.files.layout import CONVOLUTION, Form, Layout, Rule, linear
from weights.files.origin import Origin, read_weights
from weights.files.tensors import Deferred, in_shards
from weights.formats.contract import Converted, Files, Tree
from weights.formats.llama_runs import text_run
from weights.formats.transformers_llama import (
    IDLE_KEYS,
    TEXT,
    WEIGHTS,
    gated_mlp,
    self_layer,
    stored_dtype,
    text_config,
    text_fields,
    written_dtype,
)

_WHAT = "this Llama Vision"
_EMBEDDING = "language_model.model.embed_tokens.weight"
_OWN, _EXTRA = f"{_EMBEDDING}.own", f"{_EMBEDDING}.extra"  # its two parts, which are two of ours
_VOCABULARY = 128256
_ENDS = {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004}
_NO_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_ANY_GROUP = Field("an object", lambda value: isinstance(value, Mapping), {})
_CONFIG: dict[str, Field] = {
    **dict.fromkeys(IDLE_KEYS, IDLE),
    "text_config": _ANY_GROUP,
    "vision_config": _ANY_GROUP,
    "image_token_index": whole(128256, low=0),
    "image_token_id": whole(None, low=0).or_null(),
    "tie_word_embeddings": IDLE,
}
_TEXT: dict[str, Field] = {
    **TEXT,
    "vocab_size": whole(_VOCABULARY),
    "intermediate_size": whole(14336),
    "num_hidden_layers": whole(40, high=1024),
    "num_key_value_heads": whole(8),
    "cross_attention_layers": several(whole(low=0), [3, 8, 13, 18, 23, 28, 33, 38]),
    "hidden_activation": IDLE,
    "rope_theta": real(500000.0),
}
_VISION: dict[str, Field] = {
    **dict.fromkeys(IDLE_KEYS, IDLE),
    "hidden_size": whole(1280),
    "hidden_act": fixed("gelu"),
    "num_hidden_layers": whole(32, high=1024),
    "num_global_layers": whole(8, high=1024),
    "attention_heads": whole(16),
    "num_attention_heads": IDLE,
    "num_channels": fixed(3),
    "intermediate_size": whole(5120),
    "vision_output_dim": whole(7680),
    "image_size": whole(448),
    "patch_size": whole(14),
    "norm_eps": fixed(1e-5),
    "max_num_tiles": whole(4, high=64),
    "intermediate_layers_indices": several(whole(low=0), [3, 7, 15, 23, 30]),
    "supported_aspect_ratios": IDLE,  # compared with ours below
    "tie_word_embeddings": IDLE,
}
_PREPROCESSOR: dict[str, Field] = {
    "image_mean": several(real(), IMAGE_MEAN, length=3),
    "image_std": several(real(low=0, above=True), IMAGE_STD, length=3),
}

# [canvases, T, P, D] <-> a row for each canvas.
_ROWS = Form(
    outward=lambda array: array.reshape(len(array), -1),
    inward=lambda array, shape: array.reshape(shape),
)


def layout(model: VisionAdapter) -> Layout:
    """The table of a network's tensors, by their names on the hub; `split_embedding` makes two of one of them."""
    language, vision = "language_model.model", "vision_model"

    def own(match: re.Match[str]) -> str:
        index = int(match[1])
        return f"{language}.layers.{index + sum(layer <= index for layer in model.cross_layers)}"

    def cross(match: re.Match[str]) -> str:
        index = int(match[1])
        return f"{language}.layers.{model.cross_layers[index] + index}"

    def renamed(rules: tuple[Rule, ...], layer: Any) -> tuple[Rule, ...]:
        def names_of(rule: Rule) -> Any:
            assert not callable(rule.names)  # those above are templates
            names = (rule.names,) if isinstance(rule.names, str) else rule.names
            return lambda match: tuple(name.replace("LAYER", layer(match)) for name in names)

        return tuple(Rule(rule.path, names_of(rule), rule.kernel, rule.other, rule.axis) for rule in rules)

    looks, theirs = r"cross_blocks_(\d+)", "LAYER"
    return Layout(
        what=f"{_WHAT} in the layout of transformers",
        rules=(
            Rule(r"language/embedding/embedding", _OWN),
            Rule(r"extra_embedding/embedding", _EXTRA),
            *renamed(self_layer(r"language/blocks_(\d+)", "LAYER"), own),
            Rule(r"language/final_norm/scale", f"{language}.norm.weight"),
            Rule(r"language/text_head/kernel", "language_model.lm_head.weight"),
            *renamed(
                (
                    Rule(rf"{looks}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
                    Rule(rf"{looks}/attention/query/kernel", f"{theirs}.cross_attn.q_proj.weight"),
                    Rule(
                        rf"{looks}/attention/key_value/kernel",
                        (f"{theirs}.cross_attn.k_proj.weight", f"{theirs}.cross_attn.v_proj.weight"),
                    ),
                    Rule(rf"{looks}/attention/query_norm/scale", f"{theirs}.cross_attn.q_norm.weight"),
                    Rule(rf"{looks}/attention/key_norm/scale", f"{theirs}.cross_attn.k_norm.weight"),
                    Rule(rf"{looks}/attention/out/kernel", f"{theirs}.cross_attn.o_proj.weight", linear(inputs=2)),
                    Rule(rf"{looks}/attention_gate", f"{theirs}.cross_attn_attn_gate"),
                    Rule(rf"{looks}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
                    *gated_mlp(looks, theirs),
                    Rule(rf"{looks}/mlp_gate", f"{theirs}.cross_attn_mlp_gate"),
                ),
                cross,
            ),
            Rule(r"projection/kernel", "multi_modal_projector.weight"),
            Rule(r"projection/bias", "multi_modal_projector.bias"),
            Rule(r"encoder/patch/kernel", f"{vision}.patch_embedding.weight", CONVOLUTION),
            Rule(r"encoder/class_embedding", f"{vision}.class_embedding"),
            Rule(r"encoder/position/embedding", f"{vision}.gated_positional_embedding.embedding"),
            Rule(r"encoder/position_gate", f"{vision}.gated_positional_embedding.gate"),
            Rule(
                r"encoder/tile_position/embedding",
                f"{vision}.gated_positional_embedding.tile_embedding.weight",
                other=_ROWS,
            ),
            Rule(
                r"encoder/first_tile/embedding", f"{vision}.pre_tile_positional_embedding.embedding.weight", other=_ROWS
            ),
            Rule(r"encoder/first_tile_gate", f"{vision}.pre_tile_positional_embedding.gate"),
            Rule(
                r"encoder/last_tile/embedding", f"{vision}.post_tile_positional_embedding.embedding.weight", other=_ROWS
            ),
            Rule(r"encoder/last_tile_gate", f"{vision}.post_tile_positional_embedding.gate"),
            *_norm("encoder/first_norm", f"{vision}.layernorm_pre"),
            *_norm("encoder/last_norm", f"{vision}.layernorm_post"),
            *_tower(r"encoder/blocks_(\d+)", rf"{vision}.transformer.layers.\1"),
            *_tower(r"encoder/global_blocks_(\d+)", rf"{vision}.global_transformer.layers.\1"),
        ),
        leaves={},
        ignored=r".*rotary_emb\.inv_freq",
    )


def mllama_fields(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads a config as {"name": "vision_adapter", fields of `models.vision_adapter.VisionAdapter`}.

    Args:
      config: config.json.
      preprocessor: preprocessor_config.json, for the mean and deviation of pictures; None for CLIP's.

    Raises:
      UserError: if ours cannot compute what it describes.
    """
    given = read_fields(_WHAT, config, _CONFIG)
    text = read_fields(f"the text_config of {_WHAT}", config.get("text_config", {}), _TEXT)
    vision = read_fields(f"the vision_config of {_WHAT}", config.get("vision_config", {}), _VISION)
    merged = text["cross_attention_layers"]
    own = text["num_hidden_layers"] - len(merged)
    cross = [layer - index for index, layer in enumerate(merged)]
    features = vision["intermediate_layers_indices"]
    tiles = vision["max_num_tiles"]
    width, heads = vision["hidden_size"], vision["attention_heads"]
    problems = []
    if (
        list(merged) != sorted(set(merged))
        or not all(0 <= layer < own for layer in cross)
        or cross != sorted(set(cross))
    ):
        problems.append(
            f"cross_attention_layers {merged} are not layers each with one of the language model's behind it"
        )
    if vision["vision_output_dim"] != width * (1 + len(features)):
        problems.append(
            f"hidden_size {width} and intermediate_layers_indices {features} do not make vision_output_dim "
            f"{vision['vision_output_dim']}"
        )
    if vision["supported_aspect_ratios"] and [list(each) for each in vision["supported_aspect_ratios"]] != [
        list(each) for each in canvases(tiles)
    ]:
        problems.append(f"supported_aspect_ratios are not all of {tiles} tiles in their order")
    if problems:
        raise UserError(f"{_WHAT} cannot be converted: {'; '.join(problems)}")
    prepared = {key: value for key, value in (preprocessor or {}).items() if key in _PREPROCESSOR}
    prepared = read_fields(f"the preparation of pictures for {_WHAT}", prepared, _PREPROCESSOR)
    image_token = given["image_token_index"] if given["image_token_id"] is None else given["image_token_id"]
    return {
        "name": "vision_adapter",
        **text_fields(_WHAT, text),
        "depth": own,
        "cross_layers": tuple(cross),
        "image_token": image_token,
        "extra_tokens": 8,
        "tile_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "image_width": width,
        "image_heads": heads,
        "image_layers": vision["num_hidden_layers"],
        "global_layers": vision["num_global_layers"],
        "image_mlp_ratio": ratio if (ratio := vision["intermediate_size"] / width) % 1 else int(ratio),
        "max_tiles": tiles,
        "feature_layers": tuple(features),
        "tile_tables": "canvases",
        "image_mean": tuple(prepared["image_mean"]),
        "image_std": tuple(prepared["image_std"]),
    }


def mllama_config(model: VisionAdapter) -> dict[str, Any]:
    """Returns config.json of an `MllamaForConditionalGeneration` of the same weights.

    Raises:
      UserError: if there is none.
    """
    if model.extra_tokens != 8 or model.tied:
        has = "a tied head" if model.tied else f"{model.extra_tokens} extra tokens"
        raise UserError(
            f"this network cannot be written for transformers: it has {has}, and Mllama a head and 8 tokens"
        )
    text = {
        "model_type": "mllama_text_model",
        **text_config(model),
        "num_hidden_layers": model.depth + len(model.cross_layers),
        "cross_attention_layers": [layer + index for index, layer in enumerate(model.cross_layers)],
        # The library's defaults are of the published vocabulary, and it looks the pad up in the table.
        **(_ENDS if model.text_vocab_size == _VOCABULARY else _NO_ENDS),
    }
    text.pop("head_dim")
    if model.head_dim not in (None, model.width // model.heads):
        raise UserError("this network cannot be written for transformers: its heads do not share its width")
    vision = {
        "model_type": "mllama_vision_model",
        "hidden_size": model.image_width,
        "hidden_act": "gelu",
        "num_hidden_layers": model.image_layers,
        "num_global_layers": model.global_layers,
        "attention_heads": model.image_heads,
        "num_channels": 3,
        "intermediate_size": round(model.image_width * model.image_mlp_ratio),
        "vision_output_dim": model.image_width * (1 + len(model.feature_layers)),
        "image_size": model.tile_size,
        "patch_size": model.patch_size,
        "norm_eps": 1e-5,
        "max_num_tiles": model.max_tiles,
        "intermediate_layers_indices": list(model.feature_layers),
        "supported_aspect_ratios": [list(each) for each in canvases(model.max_tiles)],
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": model.image_token,
        "text_config": text,
        "vision_config": vision,
    }


def mllama_preprocessor(model: VisionAdapter) -> dict[str, Any]:
    """Returns preprocessor_config.json."""
    return {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_pad": True,
        "resample": 2,  # bilinear
        "size": {"height": model.tile_size, "width": model.tile_size},
        "max_image_tiles": model.max_tiles,
        "image_mean": list(model.image_mean),
        "image_std": list(model.image_std),
    }


def mllama_tensors(model: VisionAdapter, params: Tree) -> dict[str, Deferred]:
    """The tensors by their names on the hub, made one by one."""
    tensors = layout(model).write_deferred({"params": with_tables_of_canvases(model, params)})
    own, extra = tensors.pop(_OWN), tensors.pop(_EXTRA)
    rows = own.shape[0] + extra.shape[0]

    def joined() -> np.ndarray:
        return np.concatenate([np.asarray(own), np.asarray(extra)])

    return {_EMBEDDING: Deferred((rows, own.shape[1]), own.dtype, joined), **tensors}


def mllama_params(model: VisionAdapter, tensors: Mapping[str, Any]) -> Tree:
    """Parameters, which stay where the tensors are until they are used, of tensors by their names there or in memory.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape.
    """
    named = {_hub_name(name): array for name, array in tensors.items()}
    whole_table = named.pop(_EMBEDDING, None)
    if whole_table is not None:
        named |= {_OWN: whole_table[: -model.extra_tokens], _EXTRA: whole_table[-model.extra_tokens :]}
    return layout(model).read_deferred(model, named)["params"]


def read_mllama(origin: Origin) -> Converted:
    """Reads what `MllamaForConditionalGeneration.save_pretrained` wrote; parameters stay in the files.

    Raises:
      UserError: if files are missing or say something else.
    """
    prepared = "preprocessor_config.json"
    preprocessor = None if origin.find(prepared) is None else origin.json(prepared)
    fields = mllama_fields(origin.json("config.json"), preprocessor)
    tensors = read_weights(origin, WEIGHTS, r".*rotary_emb\.inv_freq")
    fields |= stored_dtype(tensors)
    params = mllama_params(create_model(**fields), tensors)
    return text_run(origin, fields, params, {"image_size": fields["tile_size"], "max_tiles": fields["max_tiles"]})


def mllama_files(model: VisionAdapter, params: Tree) -> Files:
    """What `MllamaForConditionalGeneration.from_pretrained` reads; tensors are made one by one.

    Raises:
      UserError: if it cannot compute what `model` does.
    """
    return {
        "config.json": {**mllama_config(model), "dtype": written_dtype(params)},
        "preprocessor_config.json": mllama_preprocessor(model),
        **in_shards(mllama_tensors(model, params)),
    }


def with_tables_of_canvases(model: VisionAdapter, params: Tree) -> Tree:
    """Parameters whose positions of tiles are tables of canvases, of a network that has a grid of each."""
    if model.tile_tables == "canvases":
        return params
    encoder = dict(params["encoder"])
    for name in ("tile_position", "first_tile", "last_tile"):
        encoder[name] = {"embedding": _spread(encoder[name]["grid"])}
    return {**params, "encoder": encoder}


def _spread(grid: Any) -> Deferred:
    """`models.layers.tile_positions.spread_grid` when it is asked for."""
    tables = len(canvases(grid.shape[0])) + 1
    shape = (tables, grid.shape[0], *grid.shape[2:])
    return Deferred(shape, grid.dtype, lambda: np.asarray(spread_grid(jnp.asarray(np.asarray(grid)))))


def _hub_name(name: str) -> str:
    """A tensor's name on the hub, of that or of the one it has in memory since transformers 4.52."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^model\.(vision_model|multi_modal_projector)\.", r"\1.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return Rule(rf"{ours}/scale", rf"{theirs}.weight"), Rule(rf"{ours}/bias", rf"{theirs}.bias")


def _tower(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a layer of the image encoder."""
    return (
        *_norm(rf"{ours}/attention_norm", rf"{theirs}.input_layernorm"),
        Rule(
            rf"{ours}/attention/query_key_value/kernel",
            tuple(rf"{theirs}.self_attn.{name}_proj.weight" for name in "qkv"),
        ),
        Rule(rf"{ours}/attention/out/kernel", rf"{theirs}.self_attn.o_proj.weight", linear(inputs=2)),
        *_norm(rf"{ours}/mlp_norm", rf"{theirs}.post_attention_layernorm"),
        *(
            rule
            for name, number in (("up", 1), ("down", 2))
            for rule in (
                Rule(rf"{ours}/mlp/{name}/kernel", rf"{theirs}.mlp.fc{number}.weight"),
                Rule(rf"{ours}/mlp/{name}/bias", rf"{theirs}.mlp.fc{number}.bias"),
            )
        ),
        Rule(rf"{ours}/attention_gate", rf"{theirs}.gate_attn"),
        Rule(rf"{ours}/mlp_gate", rf"{theirs}.gate_ffn"),
    )
