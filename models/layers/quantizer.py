"""Vector quantization: the nearest vector of a codebook (van den Oord et al. 2017, eq. 1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def nearest_code(z: Float[Array, "*n e"], embedding: Float[Array, "v e"]) -> Int[Array, "*n"]:
    """The index of the codebook vector nearest to each z, in Euclidean distance; the first of equals.

    |z|^2 is left out of |z - c|^2: it is the same for every code. The product is at the highest precision because
    bfloat16 passes (the default on TPU) would pick a neighbor where two codes are close.
    """
    product = jnp.matmul(z, embedding.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(jnp.square(embedding), axis=-1) - 2 * product, axis=-1).astype(jnp.int32)


def straight_through(soft: Float[Array, "*n e"], hard: Float[Array, "*n e"]) -> Float[Array, "*n e"]:
    """`hard` in the forward pass, the gradient of `soft` in the backward pass (Bengio et al. 2013)."""
    return soft + jax.lax.stop_gradient(hard - soft)
