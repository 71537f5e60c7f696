"""CLIP's convolutional image tower, the modified ResNet (Radford et al. 2021, section 2.4).

A ResNet-50 with three changes: a stem of three convolutions and an average pool; every strided convolution replaced by
a convolution of stride 1 and an average pool, which does not alias (Zhang 2019); and attention in place of the global
average pool, whose one query is the mean over positions.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.layers.attention import attend_from_one
from models.layers.convolution import Conv
from models.layers.dense import DenseGeneral
from models.layers.initialization import torch_bias, torch_kernel

EXPANSION = 4


class ConvNorm(nn.Module):
    """A convolution without bias, zero-padded to keep the size, and batch normalization (momentum 0.1, epsilon 1e-5).

    Training uses the statistics of the batch, over all devices that hold it, and moves their running averages in the
    collection `batch_stats`, with the biased variance (PyTorch moves them with the unbiased one).

    Attributes:
      features: output channels.
      kernel: side of the kernel.
      stride: of the convolution.
      scale_init: initializer of the gain.
      dtype: of the computation; statistics are float32.
      param_dtype: of the parameters.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 {self.features}"]:
        """Applies both."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        edge = self.kernel // 2
        x = Conv(
            self.features,
            (self.kernel, self.kernel),
            self.stride,
            padding=((edge, edge), (edge, edge)),  # "SAME" pads on one side only where the stride is 2
            use_bias=False,
            kernel_init=torch_kernel,
            name="conv",
            **types,
        )(x)
        norm = nn.BatchNorm(
            not train,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,
            scale_init=self.scale_init,
            name="norm",
            **types,
        )
        return norm(x)


class Bottleneck(nn.Module):
    """x + three convolutions, the last of which has a gain that starts at 0.

    Attributes:
      features: width of the inner convolutions; the output has 4 times as many channels.
      stride: height and width are averaged over squares of this side.
      dtype, param_dtype: as in `ConvNorm`.
    """

    features: int
    stride: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = self.features * EXPANSION
        y = nn.relu(ConvNorm(self.features, name="conv_1", **types)(x, train))
        y = nn.relu(ConvNorm(self.features, 3, name="conv_2", **types)(y, train))
        y = average_pool(y, self.stride)
        y = ConvNorm(width, scale_init=nn.initializers.zeros_init(), name="conv_3", **types)(y, train)
        if self.stride > 1 or x.shape[-1] != width:
            x = ConvNorm(width, name="skip", **types)(average_pool(x, self.stride), train)
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """Attention from the mean of all positions to that mean and all positions, and a projection of what it reads.

    Kernels and positions start at N(0, 1 / width), biases as PyTorch's do.

    Attributes:
      heads: number of heads.
      features: output width E.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    heads: int
    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b {self.features}"]:
        """Pools a feature map."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(x.shape[-1] ** -0.5)
        dense = {"kernel_init": init, "bias_init": torch_bias(x.shape[-1]), **types}
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1)
        position = nn.Embed(x.shape[1], x.shape[-1], embedding_init=init, name="position", **types)
        x = x + position(jnp.arange(x.shape[1]))
        heads = (self.heads, x.shape[-1] // self.heads)
        query, key, value = (DenseGeneral(heads, name=name, **dense) for name in ("query", "key", "value"))
        q = query(x[:, 0])
        if self.is_initializing():  # the layers make their parameters
            for layer in (key, value):
                layer(x)
        key_params, value_params = key.variables["params"], value.variables["params"]
        kernels = (params["kernel"].astype(self.dtype) for params in (key_params, value_params))
        y = attend_from_one(q, x, *kernels) + value_params["bias"].astype(self.dtype)
        return DenseGeneral(self.features, axis=(-2, -1), name="out", **dense)(y)


class ModifiedResNet(nn.Module):
    """The tower: stem, four stages of bottlenecks, attention pool.

    Attributes:
      layers: bottlenecks of each stage; (3, 4, 6, 3) in RN50.
      width: channels behind the stem; a stage has 1, 2, 4, 8 times as many inside and 4 times that at its end.
      heads: of the attention pool; 32 width / 64 where published.
      features: output width E.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    layers: tuple[int, ...]
    width: int
    heads: int
    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], train: bool) -> Float[Array, "b {self.features}"]:
        """Embeds normalized pictures whose sides are multiples of 32."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = images.astype(self.dtype)
        for i, (features, stride) in enumerate([(self.width // 2, 2), (self.width // 2, 1), (self.width, 1)], start=1):
            x = nn.relu(ConvNorm(features, 3, stride, name=f"stem_{i}", **types)(x, train))
        x = average_pool(x, 2)
        for stage, count in enumerate(self.layers):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage_{stage + 1}_block_{block + 1}"
                x = Bottleneck(self.width * 2**stage, stride, name=name, **types)(x, train)
        return AttentionPool(self.heads, self.features, name="pool", **types)(x)


def average_pool(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b h2 w2 c"]:
    """Averages over squares that do not overlap."""
    return nn.avg_pool(x, (side, side), (side, side)) if side > 1 else x
