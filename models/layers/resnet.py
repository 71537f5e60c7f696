"""Residual blocks of convolutions without normalization, of DALL-E's discrete VAE (Ramesh et al. 2021, App. A)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers.convolution import Conv

# W ~ N(0, 1 / (n_in * kernel^2)), not truncated: the initialization published with the discrete VAE.
KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def conv(features: int, kernel: int, dtype: Any, param_dtype: Any, name: str) -> nn.Conv:
    """A square, zero-padded convolution of stride 1 that keeps the image size, with the published initialization."""
    return Conv(
        features,
        (kernel, kernel),
        padding="SAME",
        kernel_init=KERNEL_INIT,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


class BottleneckBlock(nn.Module):
    """x + gain * (ReLU, convolution) four times, the middle ones narrower.

    Attributes:
      features: output width; the skip path gets a 1x1 convolution only where the input is of another width.
      kernels: the four kernel sizes; (3, 3, 3, 1) in the published encoder, (1, 3, 3, 3) in the published decoder.
      bottleneck: the inner convolutions have features / bottleneck channels.
      gain: weight of the residual path; without normalization it keeps the variance of a deep stack near one.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    features: int
    kernels: tuple[int, ...]
    bottleneck: int = 4
    gain: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w {self.features}"]:
        """Applies the block."""
        if self.features % self.bottleneck:
            raise ValueError(f"bottleneck={self.bottleneck} does not divide the width {self.features} of a block")
        inner = self.features // self.bottleneck
        residual = x
        for i, kernel in enumerate(self.kernels, start=1):
            width = self.features if i == len(self.kernels) else inner
            residual = conv(width, kernel, self.dtype, self.param_dtype, f"conv_{i}")(nn.relu(residual))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, self.param_dtype, "id_path")(x)
        return x + self.gain * residual
