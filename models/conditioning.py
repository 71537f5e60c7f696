"""What a diffusion network is told beside the noisy picture and the time."""

from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from models.layers.attention import KeyLengths

# Shapes alone where a network is described and not run; `Any` to type checkers, as whoever computes has arrays.
_ArrayOrShape: Any = Array | jax.ShapeDtypeStruct


@struct.dataclass
class Conditioning:
    """One example's description in each row; what a network was not built for must be None.

    Attributes:
      tokens: [B L D], a sequence to attend to, such as the features of a caption.
      mask: [B L], True where a token is to be seen; or `KeyLengths`, how many of the first ones are, which a fused
        attention takes where a mask would keep it away; None for everywhere.
      label: [B], a class number; the last of a network's classes stands for none where guidance needs one.
    """

    tokens: Float[_ArrayOrShape, "b l d"] | None = None
    mask: Bool[_ArrayOrShape, "b l"] | KeyLengths | None = None
    label: Int[_ArrayOrShape, "b"] | None = None


def check_conditioning(conditioning: Conditioning, *, tokens: tuple[str, int], label: tuple[str, int]) -> None:
    """Raises ValueError unless a network is told what it was built for, and nothing else.

    Args:
      conditioning: what it is told.
      tokens: name and value of the field that has it read tokens where it is not 0.
      label: likewise of labels.
    """
    for name, (field, value) in (("tokens", tokens), ("label", label)):
        if (value > 0) != (getattr(conditioning, name) is not None):
            needed = f"needs conditioning.{name}" if value else f"was built without conditioning.{name}"
            raise ValueError(f"the network {needed}: its {field} is {value}")
    if conditioning.mask is not None and conditioning.tokens is None:
        raise ValueError("conditioning.mask hides tokens, and there are none; leave it out")
