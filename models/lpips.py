"""LPIPS, a distance of pictures in the features of a classifier, with VGG-16.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1, version 0.1 of the
authors' weights; Simonyan & Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition", the
network D without its dense layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.layers.convolution import Conv
from models.layers.partitioning import shard_rows

# Convolutions before each pool, and their channels; the last output of each of these is compared.
DEPTHS = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512)
# A side from which four pools leave a pixel.
MIN_IMAGE_SIZE = 16

# Of the pictures that the classifier was trained on, by channel, where 0..1 is mapped to [-1, 1].
MEAN = np.array([-0.030, -0.088, -0.188], np.float32)
DEVIATION = np.array([0.458, 0.448, 0.450], np.float32)
_EPSILON = 1e-10  # added to a norm


class LPIPS(nn.Module):
    """Two pictures to one distance; 0 for equal ones.

    There is no dropout, which the published code has in front of its linear layers: it is for training these.

    Attributes:
      widths: channels of the five stages; published ones unless the weights are random anyway.
      image_size: side of the pictures that it is described for; any of 16 or more do.
      dtype: of the convolutions; normalization and distances are float32.
      param_dtype: of the parameters.
    """

    widths: tuple[int, ...] = WIDTHS
    image_size: int = 64
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.image_size, self.image_size, 3)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),) * 2

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], others: Float[Array, "b h w 3"]) -> Float[Array, "b"]:
        """Distances of pictures in [-1, 1].

        The gradient is finite everywhere, also where all features of a pixel are 0.

        Raises:
          ValueError: if the pictures are too small, or `widths` are not five.
        """
        if len(self.widths) != len(DEPTHS):
            raise ValueError(f"widths={self.widths} must be of the {len(DEPTHS)} stages of VGG-16")
        if min(images.shape[1:3]) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"pictures are {images.shape[1]} x {images.shape[2]}; LPIPS needs {MIN_IMAGE_SIZE} or more"
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Apart: a loss has no gradient to the pictures that it is to match, so there is no backward pass through these.
        pair = [shard_rows(((x - MEAN) / DEVIATION).astype(self.dtype)) for x in (images, others)]
        distance = jnp.zeros(len(images), jnp.float32)
        for stage, (depth, width) in enumerate(zip(DEPTHS, self.widths, strict=True), start=1):
            if stage > 1:
                pair = [nn.max_pool(x, (2, 2), (2, 2)) for x in pair]
            for layer in range(1, depth + 1):
                init = nn.initializers.he_normal()  # keeps the scale of features where weights are random
                conv = Conv(width, (3, 3), kernel_init=init, name=f"conv_{stage}_{layer}", **types)
                pair = [nn.relu(conv(x)) for x in pair]
            first, second = (unit_vectors(x.astype(jnp.float32)) for x in pair)
            # The published weights are positive, without which this would be no distance.
            init = nn.initializers.uniform(2 / width)
            types_of_linear = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
            linear = nn.Dense(1, use_bias=False, kernel_init=init, name=f"lin_{stage}", **types_of_linear)
            distance += jnp.mean(linear(jnp.square(first - second)), axis=(1, 2, 3))
        return shard_rows(distance)


def unit_vectors(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each pixel's vector over its length and 1e-10; 0 where it is 0, with a gradient that is finite there too."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # The square root has no gradient at 0. Below the floor the result is the same in float32: 0 over anything.
    return x / (jnp.sqrt(jnp.maximum(squares, _EPSILON**2)) + _EPSILON)
