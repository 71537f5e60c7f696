"""Convolutions; those whose windows tile the picture as products of matrices on a CPU."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers.dense import dot_general, makes_matrices


def conv_general_dilated(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "side side2 i o"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b h2 w2 o"]:
    """`jax.lax.conv_general_dilated` of channels-last pictures, as `flax.linen.Conv` calls it.

    On a single CPU device and in float32, windows that tile the picture, single pixels or patches, make it a product of
    matrices, unless TESSERA_DENSE is `default`. Sums are in another order then, and nothing else differs.

    Args:
      x: inputs.
      kernel: filters.
      window_strides: of each axis of the picture.
      padding: "SAME", "VALID" or widths on both sides of each axis.
      **options: the plain function's others.

    Returns:
      as the plain function; docs/performance.md has what is gained.
    """
    if not makes_matrices() or x.dtype != jnp.float32 or not _tile(x, kernel, window_strides, padding, **options):
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    (down, across), (height, width) = window_strides, x.shape[1:3]
    patches = x.reshape(len(x), height // down, down, width // across, across, -1).swapaxes(2, 3)
    numbers = (((3, 4, 5), (0, 1, 2)), ((), ()))
    return dot_general(patches, kernel, numbers, precision=options.get("precision"))


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


# `flax.linen.Conv` with the convolution above, for whatever is trained.
Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: conv_general_dilated)
