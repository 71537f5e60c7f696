"""Convolutions; on a CPU with kernel gradients that XLA computes faster."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from models.layers.dense import dot_general
from models.layers.partitioning import on_one_cpu

# What a piece of the batch and its gradient may have in bytes, so that both stay in a core's second-level cache: 2 MB
# on the Xeon (Sapphire Rapids) this was measured on. Kernel gradients take up to three times as long from further away.
PIECE_BYTES = 1.5 * 2**20
# Each piece is a convolution to be traced and compiled, and programs are traced at sizes that no CPU computes.
MAX_PIECES = 32


def conv_general_dilated(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "side side2 i o"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b h2 w2 o"]:
    """`jax.lax.conv_general_dilated` of channels-last pictures, as `flax.linen.Conv` calls it.

    On a single CPU device and in float32, windows that tile the picture, single pixels or patches, make it a product of
    matrices, and the gradient of any other kernel is summed over pieces of the batch. Sums are in another order then,
    and nothing else differs: all of JAX's transformations work.

    Args:
      x: inputs.
      kernel: filters.
      window_strides: of each axis of the picture.
      padding: "SAME", "VALID" or widths on both sides of each axis.
      **options: the plain function's others.

    Returns:
      as the plain function; docs/performance.md has what is gained.
    """

    def convolve(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

    if not on_one_cpu() or x.dtype != jnp.float32:
        return convolve(x, kernel)
    if _tile(x, kernel, window_strides, padding, **options):
        (down, across), (height, width) = window_strides, x.shape[1:3]
        patches = x.reshape(len(x), height // down, down, width // across, across, -1).swapaxes(2, 3)
        numbers = (((3, 4, 5), (0, 1, 2)), ((), ()))
        return dot_general(patches, kernel, numbers, precision=options.get("precision"))

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


def _tile(
    x: Array,
    kernel: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    **_: Any,
) -> bool:
    """Whether each pixel and each channel of x is in one window, and the windows have neither gaps nor padding."""
    *sides, channels = kernel.shape[:-1]
    padded = not isinstance(padding, str) and any(width for widths in padding for width in widths)
    dilated = {*(lhs_dilation or ()), *(rhs_dilation or ())} - {1}
    whole = not any(size % side for size, side in zip(x.shape[1:3], sides, strict=True))
    return whole and channels == x.shape[-1] and sides == list(window_strides) and not padded and not dilated


def _pieces(x: Array, y: Array, kernel: Array) -> int:
    """Into how many pieces the batch is to be split: few enough that adding up kernels costs less than is gained."""
    size = x.nbytes + y.nbytes
    return max(1, min(len(x), MAX_PIECES, -int(-size // PIECE_BYTES), size // kernel.nbytes))


# `flax.linen.Conv` with the convolution above, for whatever is trained.
Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: conv_general_dilated)
