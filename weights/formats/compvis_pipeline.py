"""Stable Diffusion in one file, as its authors publish it: a state dict of UNet, first stage and text encoder to ours.

The file has no config: shapes tell all sizes, and what they do not tell is known of what was published. Version 1 has 8
heads everywhere, captions read by OpenAI's CLIP and predicts the noise; version 2 has heads of 64, dense projections,
captions read by an OpenCLIP whose last layer is not applied, and predicts the noise or v, which nothing tells. Names
of the moving average have no dots.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from data.tokenizer import Tokenizer
from models import create_model
from models.unet import UNet
from weights.files.layout import CONVOLUTION, Layout, Rule, Tree
from weights.formats import clip_text, open_clip
from weights.formats.diffusers_blocks import transformer_rules

UNET = "model.diffusion_model."
_AVERAGE = "model_ema."
TEXT = _TEXT_1, _TEXT_2 = "cond_stage_model.transformer.", "cond_stage_model.model."
_HEADS, _HEAD_WIDTH = 8, 64
_MOST_ENTRIES = 65  # of a level: its way of resampling, and blocks
_BETAS = {"start": 0.00085, "end": 0.012}
# Of OpenCLIP's text tower: what is not used where its states are read.
_NOT_STATES = r"(attn_mask|logit_scale|text_projection)"


def unet_layout(model: UNet) -> Layout:
    """The table of a UNet: each way is a list of blocks, of which each is a list of layers."""
    rules = [
        Rule(r"input/(\w+)", r"input_blocks.0.0.\1", CONVOLUTION),
        *(Rule(rf"time_{i + 1}/(\w+)", rf"time_embed.{2 * i}.\1") for i in range(2)),
        Rule(r"output_norm/(\w+)", r"out.0.\1"),
        Rule(r"output/(\w+)", r"out.2.\1", CONVOLUTION),
        *_residual("mid_residual_0", "middle_block.0"),
        *transformer_rules("mid_attention()", "middle_block.1"),
        *_residual("mid_residual_1", "middle_block.2"),
    ]
    levels, entries = len(model.multipliers), model.blocks + 1
    for level in range(levels):
        attends = level in model.attention_levels
        for i in range(entries):
            down, up = f"input_blocks.{1 + level * entries + i}", f"output_blocks.{(levels - 1 - level) * entries + i}"
            rules += _residual(f"down_{level}_residual_{i}", f"{down}.0")
            rules += transformer_rules(f"down_{level}_attention_{i}()", f"{down}.1")
            rules += _residual(f"up_{level}_residual_{i}", f"{up}.0")
            rules += transformer_rules(f"up_{level}_attention_{i}()", f"{up}.1")
        down, up = f"input_blocks.{(level + 1) * entries}.0", f"output_blocks.{(levels - level) * entries - 1}"
        rules.append(Rule(rf"down_{level}_resample/conv/(\w+)", rf"{down}.op.\1", CONVOLUTION))
        rules.append(Rule(rf"up_{level}_resample/conv/(\w+)", rf"{up}.{1 + attends}.conv.\1", CONVOLUTION))
    return Layout(what="this UNet in the layout of CompVis", rules=tuple(rules))


def _residual(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(rf"{ours}/norm_1/(\w+)", rf"{theirs}.in_layers.0.\1"),
        Rule(rf"{ours}/conv_1/(\w+)", rf"{theirs}.in_layers.2.\1", CONVOLUTION),
        Rule(rf"{ours}/time/(\w+)", rf"{theirs}.emb_layers.1.\1"),
        Rule(rf"{ours}/norm_2/(\w+)", rf"{theirs}.out_layers.0.\1"),
        Rule(rf"{ours}/conv_2/(\w+)", rf"{theirs}.out_layers.3.\1", CONVOLUTION),
        Rule(rf"{ours}/skip/(\w+)", rf"{theirs}.skip_connection.\1", CONVOLUTION),
    )


def unet_fields(tensors: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Tells {"name": "unet", fields of `models.unet.UNet`} from the shapes of a UNet with transformers.

    Args:
      tensors: by their names within the UNet.
      image_size: side of the latents that it is made for.

    Raises:
      UserError: if a tensor that says a size is missing, or the network is of another kind.
    """

    def shape(name: str, *ndims: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) not in ndims or 0 in tensors[name].shape:
            raise UserError(f"this is not the UNet of Stable Diffusion in the layout of CompVis: there is no {name}")
        return tuple(tensors[name].shape)

    def found(pattern: str) -> list[int]:
        return sorted({int(match[1]) for name in tensors if (match := re.match(pattern, name))})

    width, time_width = shape("time_embed.0.weight", 2)[1], shape("time_embed.0.weight", 2)[0]
    downs, blocks = found(r"input_blocks\.(\d{1,9})\.0\.op\."), found(r"input_blocks\.(\d{1,9})\.")
    entries = downs[0] if downs else len(blocks)
    if blocks != list(range(len(blocks))) or not 2 <= entries <= _MOST_ENTRIES:
        raise UserError(
            f"this UNet has {len(blocks)} input_blocks and resamples at {downs[:8]}, which no UNet of ours has"
        )
    levels = len(blocks) // entries
    if downs != [entries * (level + 1) for level in range(levels - 1)] or len(blocks) != levels * entries:
        raise UserError(
            f"this UNet has {len(blocks)} input_blocks and resamples at {downs[:8]}, ours after as many blocks each"
        )
    firsts = [1 + level * entries for level in range(levels)]
    widths = [shape(f"input_blocks.{first}.0.out_layers.3.weight", 4)[0] for first in firsts]
    attending = {n: "1.norm.weight" for n in found(r"input_blocks\.(\d+)\.1\.norm\.")}
    projection = shape("middle_block.1.proj_in.weight", 2, 4)
    depths = found(r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    linear = len(projection) == 2
    channels = shape("input_blocks.0.0.weight", 4)
    return {
        "name": "unet",
        "image_size": image_size,
        "in_channels": channels[1],
        "out_channels": shape("out.2.weight", 4)[0],
        "width": width,
        "multipliers": tuple(each // width if each % width == 0 else each / width for each in widths),
        "attention_levels": tuple(level for level, first in enumerate(firsts) if first in attending),
        "blocks": entries - 1,
        "attention": "transformer",
        "num_classes": 0,
        "time_width": time_width,
        "context_width": shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "transformer_depth": len(depths),
        "linear_projection": linear,
        **({"head_width": _HEAD_WIDTH} if linear else {"heads": _HEADS}),
    }


def read_unet(tensors: Mapping[str, Any], image_size: int) -> tuple[dict[str, Any], Tree, tuple[str, ...]]:
    """({name, fields}, parameters, notes) of the UNet of a checkpoint; its moving average where there is one.

    Raises:
      UserError: if it is none, or tensors are missing, unexpected or of another shape.
    """
    trained = under(UNET, tensors)
    names = {name: f"{_AVERAGE}diffusion_model{name.replace('.', '')}" for name in trained}
    averaged = bool(names) and all(name in tensors for name in names.values())
    if averaged:
        trained = {name: tensors[average] for name, average in names.items()}
    fields = unet_fields(trained, image_size)
    model = create_model(**fields)
    heads = f"heads of {_HEAD_WIDTH}" if fields["linear_projection"] else f"{_HEADS} heads"
    notes = (f"its files do not tell the number of heads; as published, {heads}",)
    notes += ("of the UNet the moving average is taken",) if averaged else ()
    return fields, unet_layout(model).read_deferred(model, trained)["params"], notes


def read_text(tensors: Mapping[str, Any], tokenizer: Tokenizer | None) -> tuple[dict[str, Any], Tree, Tokenizer | None]:
    """({name, fields}, parameters, tokenizer) of the text encoder of a checkpoint.

    Raises:
      UserError: if there is none that is known, or the tokenizer is another network's.
    """
    first, second = clip_text.with_prefix(under(_TEXT_1, tensors)), under(_TEXT_2, tensors)
    second = {name: array for name, array in second.items() if not re.fullmatch(_NOT_STATES, name)}
    if first:
        layout, kept, names = clip_text.LAYOUT, first, "text_model.encoder.layers"
        table, positions = (f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position"))
    elif second:
        layout, kept, names = Layout("this OpenCLIP text tower", open_clip.CLIP.rules), second, "transformer.resblocks"
        table, positions = "token_embedding.weight", "positional_embedding"
    else:
        raise UserError("the checkpoint has no text encoder that is known: CLIP's of Stable Diffusion 1 or 2")
    layers = {int(match[1]) for name in kept if (match := re.match(rf"{re.escape(names)}\.(\d+)\.", name))}
    for name in (table, positions):
        if name not in kept or len(kept[name].shape) != 2:
            raise UserError(f"the checkpoint's text encoder has no {name}, a table of vectors")
    if second:  # the last layer is not applied
        last = max(layers, default=0)
        kept = {name: array for name, array in kept.items() if not name.startswith(f"{names}.{last}.")}
        layers -= {last}
    vocabulary, width = kept[table].shape
    end = vocabulary - 1
    if tokenizer is not None:
        tokenizer = tokenizer.padded_with("!" if second else "<|endoftext|>")
        if tokenizer.end_id != end:
            raise UserError(
                f"the tokenizer ends captions with {tokenizer.end_id}, and this network's end with {end}; give its own "
                "vocabulary as --tokenizer"
            )
    fields = {
        "name": "clip_text",
        "text_vocab_size": vocabulary,
        "text_length": kept[positions].shape[0],
        "text_end_id": end,
        "text_pad_id": 0 if second else end,
        "text_width": width,
        "text_layers": len(layers),
        "text_heads": max(1, width // _HEAD_WIDTH),
        "activation": "gelu" if second else "quick_gelu",
    }
    return fields, layout.read_deferred(create_model(**fields), kept)["params"], tokenizer


def read_process(tensors: Mapping[str, Any], prediction: str, second: bool) -> dict[str, Any]:
    """`config.process` that a checkpoint was trained on.

    Args:
      tensors: of the whole checkpoint, which may have the betas.
      prediction: "eps" or "v", "" where it is not told.
      second: whether it is of version 2, which has both.

    Raises:
      UserError: if it is not told and there are two, or the betas are others than those published.
    """
    if prediction not in ("", "eps", "v"):
        raise UserError(f"--prediction={prediction} is neither eps nor v")
    if second and not prediction:
        raise UserError(
            "Stable Diffusion 2 predicts the noise or v, and its files do not tell which; give --prediction=v (of "
            "pictures of 768) or --prediction=eps (512-base)"
        )
    schedule = {"name": "discrete", "kind": "scaled_linear", "steps": 1000, **_BETAS}
    if "betas" in tensors:
        betas = np.asarray(tensors["betas"], np.float64)
        expected = np.linspace(_BETAS["start"] ** 0.5, _BETAS["end"] ** 0.5, 1000) ** 2
        if betas.shape != expected.shape or not np.allclose(betas, expected, rtol=1e-2):
            raise UserError("the checkpoint's betas are others than those of Stable Diffusion; it is not converted")
    return {"schedule": schedule, "prediction": prediction or "eps", "variance": "small", "clip": False}


def under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
