"""Dropout with a key for each example."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def drop(x: Float[Array, "b *rest"], rate: float, keys: Key[Array, "b"]) -> Float[Array, "b *rest"]:
    """Sets each value to 0 with probability `rate` and divides the others by 1 - rate (Srivastava et al. 2014).

    What an example loses depends on its own key alone: not on the batch around it, nor on how that is split.

    Args:
      x: of any width.
      rate: in [0, 1).
      keys: of the examples; two layers need different ones.
    """
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))
