"""What a diffusion network is told beside the noisy picture and the time."""

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

Leaf = Array | jax.ShapeDtypeStruct  # a network says what it takes by shapes alone


@struct.dataclass
class Conditioning:
    """One example's description in each row; what a network was not built for must be None.

    Attributes:
      tokens: [B L D], a sequence to attend to, such as the features of a caption.
      mask: [B L], True where a token is to be seen; None for everywhere.
      label: [B], a class number; the last of a network's classes stands for none where guidance needs one.
    """

    tokens: Float[Leaf, "b l d"] | None = None
    mask: Bool[Leaf, "b l"] | None = None
    label: Int[Leaf, "b"] | None = None
