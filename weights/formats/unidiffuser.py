"""UniDiffuser's networks as their authors publish them: `uvit_v0.pth`, `uvit_v1.pth` and `caption_decoder.pth`.

Bare state dicts with nothing beside. What shapes do not tell is fixed there: 77 tokens of a caption, heads of 64, and
GPT-2's own activation. The captioner's file may hold a CLIP too, and was wrapped by a training program. The first stage
is CompVis's (`compvis.py`), the CLIPs are OpenAI's.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cli.errors import UserError
from models import create_model
from models.captioner import Captioner
from models.unidiffuser import UniDiffuser
from weights.files.layout import CONVOLUTION, Form, Layout, Rule, Tensors, Tree, linear
from weights.files.origin import Origin, WeightsFile, read_weights
from weights.formats import diffusers_text_decoder as text_decoder
from weights.formats.contract import Converted, Files, Format, Network
from weights.formats.runs import captioner_run

WEIGHTS = ("uvit.safetensors", "uvit_v1.pth", "uvit_v0.pth", "caption_decoder.safetensors", "caption_decoder.pth")
TEXT_LENGTH = 77
HEAD_WIDTH = 64

_FIRST = 2 + TEXT_LENGTH + 1  # positions before the patches'
_IGNORED = r"(module\.)?(clip(?!_img_).*|gpt\.transformer\.h\.\d+\.attn\.(bias|masked_bias))"
_POSITIONS = Form(outward=lambda array: array[None], inward=lambda array, shape: array.reshape(shape))
_POSITION = Form(outward=lambda array: array[None, None], inward=lambda array, shape: array.reshape(shape))


def _blocks(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of layers; `ours` has no group, or one."""
    leaf = rf"\{ours.count('(') + 1}"
    return (
        Rule(rf"{ours}/attention/query_key_value/(\w+)", rf"{theirs}.attn.qkv.{leaf}"),
        Rule(rf"{ours}/attention/out/(\w+)", rf"{theirs}.attn.proj.{leaf}", linear(inputs=2)),
        Rule(rf"{ours}/attention_norm/(\w+)", rf"{theirs}.norm2.{leaf}"),
        Rule(rf"{ours}/mlp_norm/(\w+)", rf"{theirs}.norm3.{leaf}"),
        Rule(rf"{ours}/mlp/up/(\w+)", rf"{theirs}.mlp.fc1.{leaf}"),
        Rule(rf"{ours}/mlp/down/(\w+)", rf"{theirs}.mlp.fc2.{leaf}"),
    )


LAYOUT = Layout(
    what="this UniDiffuser in its authors' layout",
    rules=(
        Rule(r"patch/(\w+)", r"patch_embed.proj.\1", CONVOLUTION),
        Rule(r"text_in/(\w+)", r"text_embed.\1"),
        Rule(r"clip_in/(\w+)", r"clip_img_embed.\1"),
        Rule(r"position/embedding", "pos_embed", other=_POSITIONS),
        Rule(r"data_type/embedding", "token_embedding.weight"),
        Rule(r"data_type_position", "pos_embed_token", other=_POSITION),
        *_blocks(r"in_blocks_(\d+)", r"in_blocks.\1"),
        *_blocks(r"mid_block", "mid_block"),
        *_blocks(r"out_blocks_(\d+)", r"out_blocks.\1"),
        Rule(r"skips_(\d+)/projection/(\w+)", r"out_blocks.\1.skip_linear.\2"),
        Rule(r"skips_(\d+)/norm/(\w+)", r"out_blocks.\1.norm1.\2"),
        Rule(r"final_norm/(\w+)", r"norm.\1"),
        Rule(r"pixel_head/(\w+)", r"decoder_pred.\1"),
        Rule(r"clip_head/(\w+)", r"clip_img_out.\1"),
        Rule(r"text_head/(\w+)", r"text_out.\1"),
    ),
)


def unidiffuser_fields(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """{"name": "unidiffuser", fields} of a state dict.

    Raises:
      UserError: if it is another network's.
    """
    width, channels, patch, _ = _shape(tensors, "patch_embed.proj.weight", 4)
    patches = _shape(tensors, "pos_embed", 3)[1] - _FIRST
    side = math.isqrt(max(patches, 0))
    blocks = {match[1] for name in tensors if (match := re.match(r"in_blocks\.(\d+)\.", name))}
    if side**2 != patches or not side or width % HEAD_WIDTH or not blocks:
        raise UserError(
            f"these are not the weights of a UniDiffuser of its authors: {patches + _FIRST} positions, width {width}, "
            f"{len(blocks)} layers before the middle one"
        )
    return {
        "name": "unidiffuser",
        "image_size": side * patch,
        "patch_size": patch,
        "width": width,
        "depth": 2 * len(blocks),
        "heads": width // HEAD_WIDTH,
        "in_channels": channels,
        "clip_width": _shape(tensors, "clip_img_embed.weight", 2)[1],
        "text_length": TEXT_LENGTH,
        "text_width": _shape(tensors, "text_embed.weight", 2)[1],
        "data_types": tensors["token_embedding.weight"].shape[0] if "token_embedding.weight" in tensors else 0,
        "mlp_ratio": _shape(tensors, "mid_block.mlp.fc1.weight", 2)[0] // width,
        "activation": "gelu",
    }


def captioner_fields(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """{"name": "captioner", fields} of a state dict whose names are those of diffusers.

    Raises:
      UserError: if it is another network's.
    """
    language = "transformer.transformer"
    vocabulary, width = _shape(tensors, f"{language}.wte.weight", 2)
    latents, features = _shape(tensors, "encode_prefix.weight", 2)
    return {
        "name": "captioner",
        "text_vocab_size": vocabulary,
        "length": _shape(tensors, f"{language}.wpe.weight", 2)[0],
        "width": width,
        "depth": len({match[1] for name in tensors if (match := re.match(rf"{language}\.h\.(\d+)\.", name))}),
        "heads": width // HEAD_WIDTH,
        "mlp_hidden": _shape(tensors, f"{language}.h.0.mlp.c_fc.weight", 2)[1],
        "activation": "gelu_tanh",
        "feature_width": features,
        "prefix_length": TEXT_LENGTH,
        "mapper": "bottleneck",
        "latent_width": latents,
        "text_end_id": vocabulary - 1,
    }


def to_unidiffuser(model: UniDiffuser, params: Tree) -> Tensors:
    """Converts parameters to the authors' tensors, float32.

    Raises:
      UserError: if their code does not compute what `model` does.
    """
    wanted = {"text_length": TEXT_LENGTH, "heads": model.width // HEAD_WIDTH, "activation": "gelu"}
    _check("UniDiffuser", model, wanted)
    return LAYOUT.write({"params": params})


def to_caption_decoder(model: Captioner, params: Tree) -> Tensors:
    """The same of a captioner."""
    wanted = {"prefix_length": TEXT_LENGTH, "heads": model.width // HEAD_WIDTH, "activation": "gelu_tanh"}
    _check("captioner", model, {**wanted, "mapper": "bottleneck"}, text_decoder.lost_end(model))
    tensors = text_decoder.text_decoder_to_diffusers(params)
    return {re.sub(r"^transformer\.", "gpt.", name): tensor for name, tensor in tensors.items()}


def _shape(tensors: Mapping[str, Any], name: str, rank: int) -> tuple[int, ...]:
    found = tuple(tensors[name].shape) if name in tensors else None
    if found is None or len(found) != rank or 0 in found:
        raise UserError(f"these are not the weights of a UniDiffuser of its authors: {name} is {found or 'missing'}")
    return found


def _check(what: str, model: Any, wanted: Mapping[str, Any], problems: Sequence[str] = ()) -> None:
    problems = [
        *problems,
        *(
            f"its {field} is {getattr(model, field)!r}, theirs {value!r}"
            for field, value in wanted.items()
            if getattr(model, field) != value
        ),
    ]
    if problems:
        raise UserError(f"this {what} cannot be written for its authors' code: {'; '.join(problems)}")


def _recognizes(origin: Origin) -> bool:
    if isinstance(origin, WeightsFile):
        return re.match(r"(uvit_v[01]|caption_decoder)\b", origin.path.name) is not None
    return origin.find(*WEIGHTS) is not None


def _read(origin: Origin) -> Converted:
    tensors = read_weights(origin, WEIGHTS, _IGNORED)
    if "encode_prefix.weight" not in tensors:
        fields = unidiffuser_fields(tensors)
        params = LAYOUT.read(create_model(**fields), tensors)["params"]
        return Converted({"objective": "", "models": {"unidiffuser": fields}}, {"unidiffuser": params})
    named = {re.sub(r"^gpt\.", "transformer.", name): np.asarray(array) for name, array in tensors.items()}
    fields = captioner_fields(named)
    params = text_decoder.text_decoder_from_diffusers(create_model(**fields), named)
    return captioner_run(fields, params)


def _write(network: Network) -> Files:
    if isinstance(network.model, Captioner):
        return {"caption_decoder.safetensors": to_caption_decoder(network.model, network.params)}
    return {"uvit.safetensors": to_unidiffuser(network.model, network.params)}


FORMAT = Format(
    name="unidiffuser",
    networks=("unidiffuser", "captioner"),
    inputs="uvit_v0.pth, uvit_v1.pth or caption_decoder.pth of the authors",
    outputs="load_state_dict of the authors' classes",
    recognizes=_recognizes,
    read=_read,
    write=_write,
)
