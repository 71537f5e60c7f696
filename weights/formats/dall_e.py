"""The discrete VAE of the DALL-E package (github.com/openai/DALL-E): state dicts to our parameters, and back.

The package stores encoder and decoder apart; a tensor is `blocks.group_1.block_2.res_path.conv_3.w` (or `.b`), kernels
[out, in, height, width]. Ours is `encoder/group_1_block_2/conv_3/kernel`, [height, width, in, out]; the decoder's
first 1x1 convolution is a matrix [in, out] here, since it is also used as a lookup table.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.dvae import DiscreteVAE
from weights.files.layout import CONVOLUTION, Layout, Rule, Tensors

_LAYOUT = Layout(
    what="this discrete VAE",
    rules=(
        Rule(r"(\w+)/(group_\d+)_(block_\d+)/(conv_\d+)/(\w+)", r"\1.blocks.\2.\3.res_path.\4.\5", CONVOLUTION),
        Rule(r"(\w+)/(group_\d+)_(block_\d+)/(\w+)/(\w+)", r"\1.blocks.\2.\3.\4.\5", CONVOLUTION),
        Rule(r"(\w+)/output/(\w+)", r"\1.blocks.output.conv.\2", CONVOLUTION),
        Rule(r"(\w+)/(\w+)/(\w+)", r"\1.blocks.\2.\3", CONVOLUTION),
    ),
    leaves={"kernel": "w", "bias": "b"},
)


def from_dall_e(
    model: DiscreteVAE, encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Converts the package's state dicts to the parameters of `model`, in its `param_dtype`.

    Args:
      model: says what shapes are expected.
      encoder: state dict of the encoder, as numpy arrays.
      decoder: state dict of the decoder, as numpy arrays.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    given = {f"encoder.{name}": array for name, array in encoder.items()}
    given |= {f"decoder.{name}": array for name, array in decoder.items()}
    return _LAYOUT.read(model, given)["params"]


def to_dall_e(params: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    """Converts parameters to the package's (encoder, decoder) state dicts of float32 numpy arrays."""
    state: dict[str, Tensors] = {"encoder": {}, "decoder": {}}
    for full_name, tensor in _LAYOUT.write({"params": params}).items():
        side, name = full_name.split(".", 1)
        state[side][name] = tensor
    return state["encoder"], state["decoder"]
