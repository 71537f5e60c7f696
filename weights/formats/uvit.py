"""U-ViT as its authors have it (github.com/baofff/U-ViT): arguments or shapes, and state dicts to ours, and back.

They publish bare state dicts, `nnet_ema.pth` in a run of theirs and `<dataset>_uvit_<size>.pth` for download; what
shapes do not tell stands in the code that loads them: 77 tokens of context, and heads of 64, in the huge network of 72.
Our own files have the arguments of the published classes, `libs.uvit.UViT` and `libs.uvit_t2i.UViT`, beside them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from models import create_model
from models.uvit import UViT
from weights.files.fields import IDLE, Field, fixed, flag, read_fields, real, whole, word
from weights.files.layout import CONVOLUTION, Form, Layout, Rule, Tensors, Tree, linear
from weights.files.origin import Origin, WeightsFile, read_weights
from weights.formats.contract import Converted, Files, Format
from weights.formats.runs import denoiser_run
from weights.formats.transformers import mlp_ratio

ARGUMENTS = "nnet.json"
WEIGHTS = ("nnet_ema.safetensors", "nnet_ema.pth", "nnet.pth")

CONTEXT_LENGTH = 77
_HEAD_WIDTHS = {1152: 72}  # by the network's width; all others have 64

# Positions of all tokens [L, D] <-> [1, L, D].
_WITH_BATCH = Form(outward=lambda array: array[None], inward=lambda array, shape: array.reshape(shape))

# Of the published classes: (argument, our field, what it may be).
_ARGUMENTS: tuple[tuple[str, str, Field], ...] = (
    ("img_size", "image_size", whole(224)),
    ("patch_size", "patch_size", whole(16)),
    ("in_chans", "in_channels", whole(3)),
    ("embed_dim", "width", whole(768)),
    ("depth", "depth", whole(12, high=1024)),
    ("num_heads", "heads", whole(12)),
    ("mlp_ratio", "mlp_ratio", real(4.0, low=0, high=1024, above=True)),
    ("mlp_time_embed", "mlp_time_embed", flag(False)),
)
_CONTEXT_ARGUMENTS = (
    ("clip_dim", "context_width", whole(768)),
    ("num_clip_token", "context_length", whole(CONTEXT_LENGTH)),
)
_OTHER_ARGUMENTS: dict[str, Field] = {
    **{"name": word(), "use_checkpoint": IDLE, "qkv_bias": fixed(False), "qk_scale": fixed(None)},
    **{"conv": flag(True), "skip": flag(True)},
}

LAYOUT = Layout(
    what="this U-ViT in its authors' layout",
    rules=(
        Rule(r"patch/(\w+)", r"patch_embed.proj.\1", CONVOLUTION),
        Rule(r"time_mlp/up/(\w+)", r"time_embed.0.\1"),
        Rule(r"time_mlp/down/(\w+)", r"time_embed.2.\1"),
        Rule(r"label/(\w+)", r"label_emb.\1"),
        Rule(r"context/(\w+)", r"context_embed.\1"),
        Rule(r"position/embedding", "pos_embed", other=_WITH_BATCH),
        *(
            rule
            for ours, theirs in ((r"(in|out)_blocks_(\d+)", r"\1_blocks.\2"), (r"(mid)_(block)", r"\1_\2"))
            for rule in (
                Rule(rf"{ours}/attention_norm/(scale|bias)", rf"{theirs}.norm1.\3"),
                Rule(rf"{ours}/attention/query_key_value/(\w+)", rf"{theirs}.attn.qkv.\3"),
                Rule(rf"{ours}/attention/out/(\w+)", rf"{theirs}.attn.proj.\3", linear(inputs=2)),
                Rule(rf"{ours}/mlp_norm/(scale|bias)", rf"{theirs}.norm2.\3"),
                Rule(rf"{ours}/mlp/up/(\w+)", rf"{theirs}.mlp.fc1.\3"),
                Rule(rf"{ours}/mlp/down/(\w+)", rf"{theirs}.mlp.fc2.\3"),
            )
        ),
        Rule(r"skips_(\d+)/projection/(\w+)", r"out_blocks.\1.skip_linear.\2"),
        Rule(r"final_norm/(\w+)", r"norm.\1"),
        Rule(r"pixel_head/(\w+)", r"decoder_pred.\1"),
        Rule(r"image_conv/(\w+)", r"final_layer.\1", CONVOLUTION),
    ),
)


def from_uvit(model: UViT, tensors: Mapping[str, np.ndarray]) -> Tree:
    """Converts a published state dict to the parameters of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    return LAYOUT.read(model, tensors)["params"]


def to_uvit(model: UViT, params: Tree) -> Tensors:
    """Converts parameters to a state dict of the published class, float32.

    Raises:
      UserError: if the published classes cannot compute what `model` does.
    """
    uvit_arguments(model)
    return LAYOUT.write({"params": params})


def uvit_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arguments of a published class, as in `config.nnet`, as {"name": "uvit", fields of `models.uvit.UViT`}.

    Args:
      arguments: with the name, "uvit" or "uvit_t2i".

    Raises:
      UserError: if they are another network's, or one that ours cannot compute.
    """
    name = arguments.get("name")
    if name not in ("uvit", "uvit_t2i"):
        raise UserError(f"{ARGUMENTS} is of a network {name!r}; only 'uvit' and 'uvit_t2i' are converted")
    table = _ARGUMENTS + (_CONTEXT_ARGUMENTS if name == "uvit_t2i" else ())
    may_hold = {argument: field for argument, _, field in table} | _OTHER_ARGUMENTS
    given = read_fields(
        "this U-ViT", arguments, may_hold | ({"num_classes": whole(-1, low=-1)} if name == "uvit" else {})
    )
    fields = {ours: given[argument] for argument, ours, _ in table}
    ratio = mlp_ratio(int(fields["width"] * fields["mlp_ratio"]), fields["width"])
    return {
        "name": "uvit",
        **fields,
        "mlp_ratio": ratio,
        "activation": "gelu",
        "num_classes": max(given.get("num_classes", -1), 0),
        "convolution": "image" if given["conv"] else "none",
        "long_skip": "concat" if given["skip"] else "none",
    }


def uvit_arguments(model: UViT) -> dict[str, Any]:
    """The name and arguments of the published class that computes what `model` does; `uvit_fields` backwards.

    Raises:
      UserError: if there is none.
    """
    problems = [
        f"its {field} is {value!r}"
        for field, choices in (
            ("long_skip", ("concat", "none")),
            ("time", ("token",)),
            ("convolution", ("image", "none")),
            ("positions", ("learned",)),
            ("activation", ("gelu",)),
            ("out_channels", (model.in_channels,)),
        )
        if (value := getattr(model, field)) not in choices
    ]
    if model.depth % 2:
        problems.append(f"its depth is {model.depth}, an odd one")
    if model.num_classes and model.context_length:
        problems.append("it has classes and a context")
    if problems:
        raise UserError(f"this U-ViT cannot be written for its authors' code: {'; '.join(problems)}")
    table = _ARGUMENTS + (_CONTEXT_ARGUMENTS if model.context_length else ())
    arguments = {
        "name": "uvit_t2i" if model.context_length else "uvit",
        **{argument: getattr(model, field) for argument, field, _ in table},
        "qkv_bias": False,
        "conv": model.convolution == "image",
        "skip": model.long_skip == "concat",
    }
    return arguments if model.context_length else {**arguments, "num_classes": model.num_classes or -1}


def uvit_fields_of_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tells {"name": "uvit", fields} from the shapes of a published state dict; heads and context length by its width.

    Raises:
      UserError: if a tensor that says a size is missing, or sizes are not those of a published network.
    """
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}

    def size(name: str, axis: int) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise UserError(f"these are not the weights of a U-ViT in its authors' layout: there is no {name}")
        return shapes[name][axis]

    width, patch = size("patch_embed.proj.weight", 0), size("patch_embed.proj.weight", 2)
    classes = "label_emb.weight" in shapes
    context = CONTEXT_LENGTH if "context_embed.weight" in shapes else 0
    patches = size("pos_embed", 1) - 1 - classes - context
    grid = math.isqrt(max(patches, 0))
    head_width = _HEAD_WIDTHS.get(width, 64)
    if grid < 1 or grid**2 != patches or width % head_width:
        raise UserError(
            f"shapes do not tell the heads of a width of {width} or the picture of {size('pos_embed', 1)} tokens, "
            f"which no published U-ViT has; put {ARGUMENTS}, the arguments of its class, in the folder of the weights"
        )
    halves = {match[1] for name in shapes if (match := re.match(r"in_blocks\.(\d+)\.", name))}
    return {
        "name": "uvit",
        "image_size": grid * patch,
        "patch_size": patch,
        "in_channels": size("patch_embed.proj.weight", 1),
        "width": width,
        "depth": 2 * len(halves),
        "heads": width // head_width,
        "mlp_ratio": mlp_ratio(size("mid_block.mlp.fc1.weight", 0), width),
        "mlp_time_embed": "time_embed.0.weight" in shapes,
        **({"context_width": size("context_embed.weight", 1), "context_length": context} if context else {}),
        "activation": "gelu",
        "num_classes": size("label_emb.weight", 0) if classes else 0,
        "convolution": "image" if "final_layer.weight" in shapes else "none",
        "long_skip": "concat" if "out_blocks.0.skip_linear.weight" in shapes else "none",
    }


def read_uvit(origin: Origin) -> tuple[dict[str, Any], Tensors]:
    """Reads a file of weights, or a folder with one: ({"name": "uvit", fields}, tensors).

    Raises:
      UserError: if files are missing, or say nothing of a U-ViT that ours can compute.
    """
    tensors = read_weights(origin, WEIGHTS)
    described = origin.find(ARGUMENTS) is not None
    return uvit_fields(origin.json(ARGUMENTS)) if described else uvit_fields_of_tensors(tensors), tensors


def uvit_files(model: UViT, params: Tree) -> Files:
    """What the published code can be given.

    Raises:
      UserError: if it cannot compute what `model` does.
    """
    return {ARGUMENTS: uvit_arguments(model), WEIGHTS[0]: to_uvit(model, params)}


def _recognizes(origin: Origin) -> bool:
    if isinstance(origin, WeightsFile):
        return "uvit" in origin.path.name and re.match(r"uvit_v[01]\b", origin.path.name) is None  # UniDiffuser's
    return origin.find(ARGUMENTS, *WEIGHTS) is not None


def _read(origin: Origin) -> Converted:
    fields, tensors = read_uvit(origin)
    params = from_uvit(create_model(**fields), tensors)
    if fields["in_channels"] != 3:  # a first stage's latents, whose process is another one
        return denoiser_run(fields, params, None, {})
    # Of pixels all published networks are trained on the variance-preserving SDE (the authors' train.py).
    process = {"schedule": {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}, "prediction": "eps"}
    return denoiser_run(fields, params, process, {"sampler": "dpm_solver_singlestep", "steps": 50})


FORMAT = Format(
    name="uvit",
    networks=("uvit",),
    inputs="a U-ViT, a published .pth file or what --to=uvit writes",
    outputs="utils.get_nnet(**ARGUMENTS) of the published code with nnet.json, and load_state_dict",
    recognizes=_recognizes,
    read=_read,
    write=lambda network: uvit_files(network.model, network.params),
)
