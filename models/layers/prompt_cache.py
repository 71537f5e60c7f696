"""What language models share: which tokens see which, and the memory of a prompt and of what was made behind it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from models.layers.self_attention import KeyValueCache


@struct.dataclass
class PromptCache:
    """What was read: a prompt, padded behind to one length for all rows, and the tokens that were made since.

    Attributes:
      layers: of each layer, [R S H K]: T places for the prompt, then one for each token that is made.
      lengths: [R] tokens of the prompt that are no pads.
      prompt_length: T.
    """

    layers: tuple[KeyValueCache, ...]
    lengths: Int[Array, "r"]
    prompt_length: int = struct.field(pytree_node=False)

    def seen(self, position: Int[Array, ""]) -> Bool[Array, "r 1 1 s"]:
        """Which places token `position` of those that are made attends to: all before it but pads, and its own."""
        place = jnp.arange(self.layers[0].key.shape[1])
        made = (place >= self.prompt_length) & (place <= self.prompt_length + position)
        return ((place < self.lengths[:, None]) | made)[:, None, None]


def causal_mask(length: int, segments: Int[Array, "b l"] | None = None) -> Any:
    """What each token sees: those before it, and itself; of its own segment, if there are several.

    Returns:
      bool [L L], known while tracing, or [B 1 L L].
    """
    causal = np.tri(length, dtype=bool)
    if segments is None:
        return causal
    return (jnp.asarray(causal) & (segments[:, :, None] == segments[:, None]))[:, None]


def last_state(x: Float[Array, "b l d"], lengths: Int[Array, "b"]) -> Float[Array, "b 1 d"]:
    """The state of each example's last token."""
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
