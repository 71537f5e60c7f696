"""The discriminator of patches: a convolutional network whose every output judges a part of a picture.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3.2 and appendix 6.1.2,
as Esser et al. 2021 and latent diffusion use it.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.layers.convolution import Conv
from models.layers.initialization import torch_bias
from models.layers.partitioning import shard_rows

_KERNEL = 4


class PatchDiscriminator(nn.Module):
    """Convolutions of 4x4 with leaky ReLU between, and batch normalization behind all but the first and the last.

    `layers` convolutions of stride 2, then two of stride 1: with 3 layers each output sees 70 x 70 pixels, with 2
    layers 34 x 34. In training, normalization is by the statistics of the batch, over all devices that hold it, and
    moves their running averages in the collection `batch_stats`, with the biased variance (PyTorch moves them with the
    unbiased one). Kernels start at N(0, 0.02), gains at N(1, 0.02), biases as PyTorch's do.

    Attributes:
      layers: convolutions of stride 2; 3 as published, 2 in some of latent diffusion's.
      width: channels of the first one; each further one doubles them, up to 8 times.
      channels: of the pictures.
      image_size: side of the pictures that it is described for; any others work.
      dtype: of the computation; statistics and the last convolution are float32.
      param_dtype: of the parameters.
    """

    layers: int = 3
    width: int = 64
    channels: int = 3
    image_size: int = 256
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the first argument of `__call__`."""
        shape = (batch_size, self.image_size, self.image_size, self.channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"], train: bool = False) -> Float[Array, "b h w 1"]:
        """Logits that each part of a picture in [-1, 1] is real, float32.

        Args:
          images: the pictures.
          train: normalize by the statistics of this batch, and move the running ones.

        Raises:
          ValueError: if the pictures are too small to leave an output, or have other channels.
        """
        if images.shape[-1] != self.channels:
            raise ValueError(f"pictures have {images.shape[-1]} channels, the network's channels are {self.channels}")
        needed = 3 * 2**self.layers
        if min(images.shape[1:3]) < needed:
            raise ValueError(
                f"pictures are {images.shape[1]} x {images.shape[2]}; a discriminator of {self.layers} layers needs "
                f"{needed} or more"
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        widths = [self.width * min(2**i, 8) for i in range(self.layers + 1)]
        x = shard_rows(images.astype(self.dtype))
        for i, width in enumerate(widths):
            stride = 2 if i < self.layers else 1
            x = self._conv(f"conv_{i}", x.shape[-1], width, stride, bias=i == 0, **types)(x)
            if i:
                x = nn.BatchNorm(
                    not train,
                    momentum=0.9,
                    epsilon=1e-5,
                    use_fast_variance=False,
                    scale_init=_gain,
                    name=f"norm_{i}",
                    **types,
                )(x)
            x = shard_rows(nn.leaky_relu(x, 0.2))
        types |= {"dtype": jnp.float32}
        return shard_rows(self._conv("output", widths[-1], 1, 1, bias=True, **types)(x))

    def _conv(
        self, name: str, inputs: int, features: int, stride: int, bias: bool, dtype: DTypeLike, param_dtype: DTypeLike
    ) -> nn.Module:
        return Conv(
            features,
            (_KERNEL, _KERNEL),
            stride,
            padding=((1, 1), (1, 1)),
            use_bias=bias,
            kernel_init=nn.initializers.normal(0.02),
            bias_init=torch_bias(_KERNEL**2 * inputs),
            dtype=dtype,
            param_dtype=param_dtype,
            name=name,
        )


def _gain(key: Array, shape: Sequence[int], dtype: DTypeLike = float) -> Array:
    """N(1, 0.02)."""
    return 1 + nn.initializers.normal(0.02)(key, shape, dtype)
