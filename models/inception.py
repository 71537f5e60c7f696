"""Inception-v3 as the Frechet Inception distance uses it: the graph that Google published on 2015-12-05.

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision"; Heusel et al. 2017, "GANs Trained by a
Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", took its last pooling layer for their distance. The
graph differs from the paper, and from the Inception-v3 of other libraries, in what its features are sensitive to:
average pooling leaves the padding out of the average, the last block pools by maximum, there are 1008 classes, and
pictures are resized inside, bilinearly, without antialiasing and with corners as TensorFlow 1 has them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The smallest pictures of which every convolution and pool leaves something.
MIN_IMAGE_SIZE = 75


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalization with the stored statistics, and ReLU.

    Attributes:
      features: output channels.
      kernel: height and width.
      stride: of the convolution; a strided one is not padded.
      padding: "SAME" or "VALID".
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    features: int
    kernel: tuple[int, int]
    stride: int
    padding: str
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 {self.features}"]:
        """Applies the three."""
        x = nn.Conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=self.padding,
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),  # keeps the scale of features where weights are random
            precision=jax.lax.Precision.HIGHEST,  # faster products of float32 move the distance
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="conv",
        )(x)
        norm = nn.BatchNorm(
            use_running_average=True, epsilon=1e-3, dtype=self.dtype, param_dtype=self.param_dtype, name="bn"
        )
        return nn.relu(norm(x))


class _Block(nn.Module):
    """Parallel branches, concatenated. Layers have the names of the published PyTorch conversion."""

    width_divisor: int
    dtype: Any
    param_dtype: Any

    def conv(
        self, name: str, features: int, height: int, width: int, stride: int = 1, padding: str = "SAME"
    ) -> nn.Module:
        """The layer `name`, of `features` channels at full width."""
        return ConvNorm(
            features // self.width_divisor, (height, width), stride, padding, self.dtype, self.param_dtype, name=name
        )


class InceptionA(_Block):
    """35 x 35: 1x1, 5x5, two 3x3, and a pool (paper, fig. 5, with 5x5 kept)."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """Applies the block."""
        one = self.conv("branch1x1", 64, 1, 1)(x)
        five = self.conv("branch5x5_2", 64, 5, 5)(self.conv("branch5x5_1", 48, 1, 1)(x))
        double = self.conv("branch3x3dbl_2", 96, 3, 3)(self.conv("branch3x3dbl_1", 64, 1, 1)(x))
        double = self.conv("branch3x3dbl_3", 96, 3, 3)(double)
        pool = self.conv("branch_pool", self.pool_features, 1, 1)(average_pool(x))
        return jnp.concatenate([one, five, double, pool], axis=-1)


class InceptionB(_Block):
    """35 x 35 to 17 x 17 (paper, fig. 10)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        three = self.conv("branch3x3", 384, 3, 3, stride=2, padding="VALID")(x)
        double = self.conv("branch3x3dbl_2", 96, 3, 3)(self.conv("branch3x3dbl_1", 64, 1, 1)(x))
        double = self.conv("branch3x3dbl_3", 96, 3, 3, stride=2, padding="VALID")(double)
        return jnp.concatenate([three, double, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class InceptionC(_Block):
    """17 x 17: 7x7 kernels as 1x7 and 7x1 (paper, fig. 6)."""

    inner: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """Applies the block."""
        one = self.conv("branch1x1", 192, 1, 1)(x)
        seven = self.conv("branch7x7_2", self.inner, 1, 7)(self.conv("branch7x7_1", self.inner, 1, 1)(x))
        seven = self.conv("branch7x7_3", 192, 7, 1)(seven)
        double = self.conv("branch7x7dbl_2", self.inner, 7, 1)(self.conv("branch7x7dbl_1", self.inner, 1, 1)(x))
        double = self.conv("branch7x7dbl_4", self.inner, 7, 1)(self.conv("branch7x7dbl_3", self.inner, 1, 7)(double))
        double = self.conv("branch7x7dbl_5", 192, 1, 7)(double)
        pool = self.conv("branch_pool", 192, 1, 1)(average_pool(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class InceptionD(_Block):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        three = self.conv("branch3x3_1", 192, 1, 1)(x)
        three = self.conv("branch3x3_2", 320, 3, 3, stride=2, padding="VALID")(three)
        seven = self.conv("branch7x7x3_2", 192, 1, 7)(self.conv("branch7x7x3_1", 192, 1, 1)(x))
        seven = self.conv("branch7x7x3_3", 192, 7, 1)(seven)
        seven = self.conv("branch7x7x3_4", 192, 3, 3, stride=2, padding="VALID")(seven)
        return jnp.concatenate([three, seven, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class InceptionE(_Block):
    """8 x 8: 3x3 kernels split into 1x3 beside 3x1 (paper, fig. 7); the second of the two pools by maximum."""

    max_pooled: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """Applies the block."""
        one = self.conv("branch1x1", 320, 1, 1)(x)
        three = self.conv("branch3x3_1", 384, 1, 1)(x)
        double = self.conv("branch3x3dbl_2", 384, 3, 3)(self.conv("branch3x3dbl_1", 448, 1, 1)(x))
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.max_pooled else average_pool(x)
        branches = [
            one,
            self.conv("branch3x3_2a", 384, 1, 3)(three),
            self.conv("branch3x3_2b", 384, 3, 1)(three),
            self.conv("branch3x3dbl_3a", 384, 1, 3)(double),
            self.conv("branch3x3dbl_3b", 384, 3, 1)(double),
            self.conv("branch_pool", 192, 1, 1)(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(_Block):
    """The network. Its batch normalization uses stored statistics always: it is not for training.

    Attributes:
      width_divisor: divides every width; 1 as published, 16 (the largest) for tests.
      image_size: side to which pictures are resized, 299 as published and 75 or more.
      classes: of the classifier.
      dtype: of the computation; features have been published for float32 alone.
      param_dtype: of the parameters.
    """

    width_divisor: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    image_size: int = 299
    classes: int = 1008

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of what `__call__` takes."""
        return (jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, 3), jnp.float32),)

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Array]:
        """Measures pictures.

        Args:
          images: RGB from 0 to 255 (not [-1, 1]) of any size; of `image_size` they are taken as they are.

        Returns:
          features: the last pooling layer, float [b 2048].
          logits: of the classes, float [b 1008].
          logits_unbiased: logits without the bias of their layer, of which the Inception score is commonly computed.

        Raises:
          ValueError: if `width_divisor` does not divide every width or `image_size` is too small.
        """
        if self.width_divisor not in (1, 2, 4, 8, 16):
            raise ValueError(f"width_divisor={self.width_divisor} does not divide every width; 1, 2, 4, 8 and 16 do")
        if self.image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"image_size={self.image_size} leaves nothing of a picture; {MIN_IMAGE_SIZE} or more does")
        x = resize_tf1(images.astype(self.dtype), self.image_size)
        x = (x - 128) / 128

        x = self.conv("Conv2d_1a_3x3", 32, 3, 3, stride=2, padding="VALID")(x)
        x = self.conv("Conv2d_2a_3x3", 32, 3, 3, padding="VALID")(x)
        x = self.conv("Conv2d_2b_3x3", 64, 3, 3)(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = self.conv("Conv2d_3b_1x1", 80, 1, 1)(x)
        x = self.conv("Conv2d_4a_3x3", 192, 3, 3, padding="VALID")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))

        common = {"width_divisor": self.width_divisor, "dtype": self.dtype, "param_dtype": self.param_dtype}
        x = InceptionA(**common, pool_features=32, name="Mixed_5b")(x)
        x = InceptionA(**common, pool_features=64, name="Mixed_5c")(x)
        x = InceptionA(**common, pool_features=64, name="Mixed_5d")(x)
        x = InceptionB(**common, name="Mixed_6a")(x)
        x = InceptionC(**common, inner=128, name="Mixed_6b")(x)
        x = InceptionC(**common, inner=160, name="Mixed_6c")(x)
        x = InceptionC(**common, inner=160, name="Mixed_6d")(x)
        x = InceptionC(**common, inner=192, name="Mixed_6e")(x)
        x = InceptionD(**common, name="Mixed_7a")(x)
        x = InceptionE(**common, max_pooled=False, name="Mixed_7b")(x)
        x = InceptionE(**common, max_pooled=True, name="Mixed_7c")(x)

        features = x.mean(axis=(1, 2))
        classifier = nn.Dense(
            self.classes,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="fc",
        )
        unbiased = classifier(features)
        bias = self.param("fc_bias", nn.initializers.zeros, (self.classes,), self.param_dtype)
        logits = unbiased + bias.astype(self.dtype)
        return {"features": features, "logits": logits, "logits_unbiased": unbiased}


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The mean of each 3 x 3 neighborhood; at the border, of what there is of it."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def resize_tf1(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """Resizes as `tf.image.resize_bilinear` of TensorFlow 1 does without `align_corners`.

    Output pixel i lies at i * (input size / size): the top left corners of the pictures coincide, not their centers.
    It mixes the two pixels beside it, however much smaller the output is: there is no antialiasing.
    """
    for axis in (2, 1):
        count = images.shape[axis]
        place = np.arange(size, dtype=np.float32) * np.float32(count / size)  # rounded as TensorFlow rounds it
        low = place.astype(np.int32)
        high = np.minimum(low + 1, count - 1)
        weight = jnp.asarray(place - low, images.dtype).reshape((size,) + (1,) * (3 - axis))
        first = jnp.take(images, low, axis)
        images = first + (jnp.take(images, high, axis) - first) * weight
    return images
