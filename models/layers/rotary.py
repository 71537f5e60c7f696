"""Rotary position embeddings: queries and keys turned by angles that grow with their position."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """Turns pairs of a head's entries: scores then depend on the distance of positions (Su et al. 2021, section 3.2).

    Entry i is turned with entry i + K / 2, by position * frequency i. Networks that turn neighbors, 2i with 2i + 1, as
    the paper does, have the same heads in another order.

    A factor above 1 stretches the slow waves, for texts that are longer than those of the first training (Llama 3.1,
    `rope_scaling`): a wave shorter than original_length / high_factor stays, one longer than original_length /
    low_factor becomes `factor` times as long, and between them frequencies are blended.

    Attributes:
      theta: base of the frequencies theta^(-2i / K).
      factor: how many times as long slow waves become; 1 for none.
      low_factor: waves of original_length over this are the first slow ones.
      high_factor: those of original_length over this the last fast ones.
      original_length: positions of the first training.
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "k"]:
        """Radians a position of each pair, float32 [K / 2].

        Every step is one of float32, as in the published code: at position 20,000 another rounding of a frequency is
        another angle in the third decimal place.
        """
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        fast = np.float32(1) / np.power(np.float32(self.theta), exponent)
        if self.factor == 1:
            return fast
        length = np.float32(2 * math.pi) / fast
        low, high = self.original_length / self.low_factor, self.original_length / self.high_factor
        slow = fast / np.float32(self.factor)
        share = (np.float32(self.original_length) / length - np.float32(self.low_factor)) / np.float32(
            self.high_factor - self.low_factor
        )
        blended = (np.float32(1) - share) * slow + share * fast
        return np.where(length < high, fast, np.where(length > low, slow, blended)).astype(np.float32)

    def turn(self, x: Float[Array, "b l n k"], positions: Int[Array, "*b l"]) -> Float[Array, "b l n k"]:
        """Turns queries or keys.

        Args:
          x: of an even K.
          positions: of each, [L] for all examples or [B L]; angles are float32 whatever x is.

        Returns:
          of the dtype of x.
        """
        angles = positions[..., None, None].astype(jnp.float32) * self.frequencies(x.shape[-1])
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(x.dtype)
