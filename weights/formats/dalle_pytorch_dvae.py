"""The discrete VAE of the dalle_pytorch package (`DiscreteVAE`), the image tokenizer of a DALL-E that it trained.

Its layers are counted in two rows, "encoder.0.0", "encoder.3", "decoder.1.net.2": strided convolutions, then residual
blocks, then logits; and back, with a convolution before the blocks if there are any. What it learns to draw are pixels
less their mean, divided by their standard deviation.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from models import create_model
from models.strided_dvae import StridedDiscreteVAE
from weights.files.fields import IDLE, Field, read_fields, real, several, whole
from weights.files.layout import CONVOLUTION, Form, Layout, Rule, Tensors, Tree

_NUMBER = real()
_WHAT = "this discrete VAE of dalle_pytorch"
_TABLE: dict[str, Field] = {
    # Tensors tell these.
    **dict.fromkeys(("image_size", "num_tokens", "codebook_dim"), IDLE),
    **dict.fromkeys(("num_layers", "num_resnet_blocks", "hidden_dim"), IDLE),
    "channels": whole(3),
    "normalization": several(several(_NUMBER), ((0.5,) * 3, (0.5,) * 3), length=2).or_null(((0.5,) * 3, (0.5,) * 3)),
    # Of training.
    **dict.fromkeys(("smooth_l1_loss", "temperature", "straight_through", "reinmax", "kl_div_loss_weight"), IDLE),
}

# A transposed convolution [height, width, in, out], which slides over spread out inputs <-> [in, out, height, width],
# which spreads out what it makes: the same kernel, turned around.
_TRANSPOSED = Form(
    outward=lambda array: array[::-1, ::-1].transpose(2, 3, 0, 1),
    inward=lambda array, shape: array.transpose(2, 3, 0, 1)[::-1, ::-1].reshape(shape),
)


def dvae_layout(model: StridedDiscreteVAE) -> Layout:
    """The table of a network."""
    levels, blocks = model.levels, model.blocks
    first = 1 if blocks else 0  # of the decoder's blocks

    def place(side: str, start: int, inner: str) -> Any:
        return lambda match: f"{side}.{start + int(match[1])}.{inner}.{match[match.lastindex or 0]}"

    def within(side: str, start: int) -> Any:
        return lambda match: f"{side}.{start + int(match[1])}.net.{2 * int(match[2])}.{match[3]}"

    return Layout(
        what=_WHAT,
        rules=(
            Rule(r"codebook/embedding", "codebook.weight"),
            Rule(r"down_(\d+)/(\w+)", place("encoder", 0, "0"), CONVOLUTION),
            Rule(r"down_block_(\d+)/conv_(\d)/(\w+)", within("encoder", levels), CONVOLUTION),
            Rule(r"logits/(\w+)", rf"encoder.{levels + blocks}.\1", CONVOLUTION),
            Rule(r"input/(\w+)", r"decoder.0.\1", CONVOLUTION),
            Rule(r"up_block_(\d+)/conv_(\d)/(\w+)", within("decoder", first), CONVOLUTION),
            Rule(r"up_(\d+)/(\w+)", place("decoder", first + blocks, "0"), _TRANSPOSED),
            Rule(r"output/(\w+)", rf"decoder.{first + blocks + levels}.\1", CONVOLUTION),
        ),
    )


def dvae_fields(arguments: Any, tensors: Mapping[str, np.ndarray], grid: tuple[int, int]) -> dict[str, Any]:
    """Tells {"name": "dvae_strided", fields of `models.strided_dvae.StridedDiscreteVAE`} of arguments and tensors.

    Args:
      arguments: of the class `DiscreteVAE`, "vae_params" of a checkpoint; None for its defaults.
      tensors: its state dict.
      grid: tokens of a picture, as many down as across.

    Raises:
      UserError: if it was trained on other pixels than ours are, or a tensor that says a size is missing.
    """
    given = read_fields(_WHAT, arguments or {}, _TABLE)
    channels = given["channels"]
    # The package cuts both rows to as many entries as there are channels; without any, pixels stay as they are.
    mean, std = (row[:channels] for row in given["normalization"] or ((0.0,) * channels, (1.0,) * channels))
    fits = len(mean) == len(std) == channels and all(_NUMBER.fits(value) for value in (*mean, *std))
    if not fits or any(value <= 0 for value in std):
        raise UserError(
            f"{_WHAT} cannot be converted: normalization is {given['normalization']!r}; it must be a mean and a "
            f"standard deviation above 0 of each of {channels} channels"
        )

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != ndim or not tensors[name].size:
            raise UserError(f"these are not the weights of {_WHAT}: there is no {name}")
        return tensors[name].shape

    def found(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    codes, code_dim = shape("codebook.weight", 2)
    levels = found(r"encoder\.(\d+)\.0\.weight")
    return {
        "name": "dvae_strided",
        "image_size": grid[0] * 2**levels,
        "channels": channels,
        "vocab_size": codes,
        "code_dim": code_dim,
        "width": shape("encoder.0.0.weight", 4)[0],
        "levels": levels,
        "blocks": found(r"encoder\.(\d+)\.net\."),
        "pixel_mean": tuple(float(value) for value in mean),
        "pixel_std": tuple(float(value) for value in std),
    }


def read_dvae(arguments: Any, tensors: Tensors, grid: tuple[int, int]) -> tuple[dict[str, Any], Tree]:
    """({name, fields}, parameters) of the image tokenizer; see `dvae_fields`.

    Raises:
      UserError: as there, or if tensors are missing, unexpected or of another shape.
    """
    fields = dvae_fields(arguments, tensors, grid)
    model = create_model(**fields)
    return fields, dvae_layout(model).read(model, tensors)["params"]
