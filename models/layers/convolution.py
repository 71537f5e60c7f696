"""Convolutions; on a CPU as products of matrices where windows tile the picture, and fewer of doubled pictures."""

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


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Doubles height and width by repeating each pixel 2 x 2 times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def convolve_upsampled(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 c o"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b h2 w2 o"]:
    """`conv_general_dilated` of `upsample_nearest(x)`, 3 x 3 pixels of zero padding and stride 1.

    Of three neighbors in a doubled picture two are one pixel of x, whose weights add up. So each of the four outputs
    that a pixel becomes is a convolution of x by 2 x 2 weights of its own: 16 products in place of 36. On a single CPU
    device and in float32 it is computed so, unless TESSERA_DENSE is `default`: 2.1 times as fast forward and backward
    on one core of an EPYC (Zen 4), from 64 channels at 32 x 32 pixels to 320 at 64 x 64.

    Args:
      x: inputs before they are doubled.
      kernel: filters.
      window_strides: 1 and 1.
      padding: "SAME".
      **options: of `jax.lax.conv_general_dilated`, as `flax.linen.Conv` gives them to a layer without dilation or
        groups.

    Returns:
      the convolution, twice as high and wide as x.
    """
    if not makes_matrices() or x.dtype != jnp.float32:
        return jax.lax.conv_general_dilated(upsample_nearest(x), kernel, window_strides, padding, **options)
    before, here, behind = kernel
    rows = (jnp.stack([before, here + behind]), jnp.stack([before + here, behind]))
    lines = []
    for down, (before, here, behind) in enumerate(row.swapaxes(0, 1) for row in rows):
        columns = (jnp.stack([before, here + behind], 1), jnp.stack([before + here, behind], 1))
        phases = [
            jax.lax.conv_general_dilated(
                x, weights, window_strides, ((1 - down, down), (1 - across, across)), **options
            )
            for across, weights in enumerate(columns)
        ]
        lines.append(jnp.stack(phases, axis=3))
    batch, height, width, _ = x.shape
    return jnp.stack(lines, axis=2).reshape(batch, 2 * height, 2 * width, -1)


# `flax.linen.Conv` with the convolutions above, for whatever is trained.
Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: conv_general_dilated)
UpsampledConv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: convolve_upsampled)
