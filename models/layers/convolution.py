"""Convolutions; on a CPU with kernel gradients that XLA computes faster."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from models.layers.partitioning import device_platform

# What a piece of the batch and its gradient may have in bytes, so that both stay in a core's second-level cache (2 MB
# on server processors of this decade). XLA's kernel gradients take three times as long from further away.
PIECE_BYTES = 1.5 * 2**20


def conv_general_dilated(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "side side2 i o"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b h2 w2 o"]:
    """`jax.lax.conv_general_dilated` of channels-last pictures, as `flax.linen.Conv` calls it.

    On a single CPU device a kernel of one pixel is a matrix product, and the gradient of a larger one is summed over
    pieces of the batch. Sums are in another order then, and nothing else differs: all of JAX's transformations work.

    Args:
      x: inputs.
      kernel: filters.
      window_strides: of each axis of the picture.
      padding: "SAME", "VALID" or widths on both sides of each axis.
      **options: the plain function's others.
    """

    def convolve(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

    if device_platform() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return convolve(x, kernel)
    keeps_size = jax.eval_shape(convolve, x, kernel).shape[:-1] == x.shape[:-1]
    if keeps_size and kernel.shape[:-1] == (1, 1, x.shape[-1]):
        rows = x.reshape(-1, x.shape[-1])  # the gradients of a product with more axes are slow again
        return jnp.matmul(rows, kernel[0, 0], precision=options.get("precision")).reshape(*x.shape[:-1], -1)

    def tangent(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
        (x, kernel), (x_dot, kernel_dot) = primals, tangents
        y = convolve(x, kernel)
        terms = []
        if not isinstance(x_dot, SymbolicZero):
            terms.append(convolve(x_dot, kernel))
        if not isinstance(kernel_dot, SymbolicZero):
            # The transpose of this, piece by piece, is the kernel's gradient.
            parts = jnp.array_split(x, _pieces(x, y, kernel))
            terms.append(jnp.concatenate([convolve(part, kernel_dot) for part in parts]))
        return y, sum(terms[1:], terms[0])

    function = jax.custom_jvp(convolve)
    function.defjvp(tangent, symbolic_zeros=True)
    return function(x, kernel)


def _pieces(x: Array, y: Array, kernel: Array) -> int:
    """Into how many pieces the batch is to be split: few enough that adding up kernels costs less than is gained."""
    size = x.nbytes + y.nbytes
    return max(1, min(len(x), -int(-size // PIECE_BYTES), size // kernel.nbytes))


# `flax.linen.Conv` with the convolution above, for whatever is trained.
Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: conv_general_dilated)
