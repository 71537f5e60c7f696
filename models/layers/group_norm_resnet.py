"""Residual blocks and attention with group normalization, of diffusion's UNets and of the autoencoders beside them.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B; Dhariwal & Nichol 2021, "Diffusion Models Beat
GANs on Image Synthesis", section 3. In a UNet the last convolution or projection of each block starts at 0, so that a
new block passes its input on; in the autoencoders of latent diffusion all starts as in PyTorch.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from models.layers.convolution import Conv, UpsampledConv, upsample_nearest
from models.layers.dense import Dense
from models.layers.dropout import drop
from models.layers.initialization import torch_bias, torch_kernel
from models.layers.partitioning import shard_rows
from models.layers.self_attention import SelfAttention

Initializer = nn.initializers.Initializer

# How kernels start; biases start at 0 but for `zero_init` False.
KERNEL_INITS: dict[str, Initializer] = {
    "fan_in": torch_kernel,
    "fan_avg": nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),  # DDPM's
}
# Of a query, key and value projection in one: its output is three times as wide as that of each.
_JOINT_KERNEL_INITS: dict[str, Initializer] = {
    "fan_in": KERNEL_INITS["fan_in"],
    "fan_avg": nn.initializers.variance_scaling(1.0, "fan_in", "uniform"),
}
RESAMPLINGS = ("none", "down", "up")


def check_kernel_init(kernel_init: str) -> None:
    """Raises ValueError unless this is a key of `KERNEL_INITS`; lists the choices."""
    if kernel_init not in KERNEL_INITS:
        raise ValueError(f"unknown kernel_init {kernel_init!r}; choose one of {', '.join(KERNEL_INITS)}")


def group_norm(groups: int, epsilon: float, dtype: DTypeLike, param_dtype: DTypeLike, name: str) -> nn.GroupNorm:
    """Normalization over the pixels and neighboring channels of each group (Wu & He 2018).

    Statistics are float32, and the variance that of differences from the mean; see `models.layers.normalization`.
    """
    types = {"dtype": dtype, "param_dtype": param_dtype}
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, name=name, **types)


def start_of(
    fan_in: int, kernel_init: str = "fan_in", zero_init: bool = True, last: bool = False
) -> dict[str, Initializer]:
    """How a layer with so many inputs starts, as its `kernel_init` and `bias_init`.

    Args:
      fan_in: inputs of one output.
      kernel_init: a key of `KERNEL_INITS`.
      zero_init: biases start at 0, and the kernel too if it is a block's last; else both as PyTorch's, of every layer.
      last: whether a block ends with this layer.
    """
    zeros = nn.initializers.zeros_init()
    return {
        "kernel_init": zeros if zero_init and last else KERNEL_INITS[kernel_init],
        "bias_init": zeros if zero_init else torch_bias(fan_in),
    }


class ResidualBlock(nn.Module):
    """x + (norm, SiLU, convolution, norm, SiLU, dropout, convolution), told the time between the convolutions.

    Attributes:
      features: output channels; the skip path gets a 1x1 convolution only where the input has another number.
      scale_shift: the time scales and shifts what the second norm gives (Dhariwal & Nichol 2021, section 3.1); else it
        is added before that norm.
      resampling: "down" averages squares of 2 x 2 pixels and "up" repeats pixels, on both paths, before the first
        convolution (BigGAN's); or "none".
      dropout: probability, see `models.layers.dropout`.
      groups: of the norms.
      norm_epsilon: of the norms.
      kernel_init: a key of `KERNEL_INITS`.
      zero_init: the last convolution and all biases start at 0; else that convolution as the others, biases as in
        PyTorch.
      dtype: of the computation; statistics of norms are float32.
      param_dtype: of the parameters.
    """

    features: int
    scale_shift: bool = False
    resampling: str = "none"
    dropout: int | float = 0.0
    groups: int = 32
    norm_epsilon: float = 1e-5
    kernel_init: str = "fan_in"
    zero_init: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, "b d"] | None = None,
        dropout_keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b h2 w2 {self.features}"]:
        """Applies the block.

        Args:
          x: the input.
          time: an embedding before its last activation; None for a block that knows no time.
          dropout_keys: of the examples; None for no dropout.

        Raises:
          ValueError: on an unknown resampling, or scale and shift without a time.
        """
        if self.resampling not in RESAMPLINGS:
            raise ValueError(f"unknown resampling {self.resampling!r}; choose one of {', '.join(RESAMPLINGS)}")
        if self.scale_shift and time is None:
            raise ValueError("scale_shift needs a time")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"groups": self.groups, "epsilon": self.norm_epsilon, **types}
        start = functools.partial(start_of, kernel_init=self.kernel_init, zero_init=self.zero_init)
        given = x.shape[-1]
        y = nn.silu(group_norm(name="norm_1", **norm)(x))
        if self.resampling == "down":
            x, y = nn.avg_pool(x, (2, 2), (2, 2)), nn.avg_pool(y, (2, 2), (2, 2))
        first = UpsampledConv if self.resampling == "up" else Conv
        y = first(self.features, (3, 3), **start(9 * given), name="conv_1", **types)(y)
        if time is not None:
            told = self.features * (2 if self.scale_shift else 1)
            time = Dense(told, **start(time.shape[-1]), name="time", **types)(nn.silu(time))[:, None, None]
        if time is not None and not self.scale_shift:
            y = y + time
        y = group_norm(name="norm_2", **norm)(y)
        if time is not None and self.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            y = y * (1 + scale) + shift
        y = nn.silu(y)
        if dropout_keys is not None and self.dropout:
            y = drop(y, self.dropout, dropout_keys)
        y = Conv(self.features, (3, 3), **start(9 * self.features, last=True), name="conv_2", **types)(y)
        if given != self.features:
            x = Conv(self.features, (1, 1), **start(given), name="skip", **types)(x)
        return shard_rows((upsample_nearest(x) if self.resampling == "up" else x) + y)


class AttentionBlock(nn.Module):
    """x + self-attention of its normalized pixels; projections have biases.

    Attributes:
      heads: number of heads N; they share the channels.
      groups: of the norm.
      norm_epsilon: of the norm.
      kernel_init: a key of `KERNEL_INITS`.
      zero_init: see `ResidualBlock`; here of the output's projection.
      implementation: see `models.layers.attention.attend`.
      dtype: of the computation; statistics, scores and softmax are float32.
      param_dtype: of the parameters.
    """

    heads: int = 1
    groups: int = 32
    norm_epsilon: float = 1e-5
    kernel_init: str = "fan_in"
    zero_init: bool = True
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the block."""
        width = x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        last = start_of(width, self.kernel_init, self.zero_init, last=True)
        attention = SelfAttention(
            width,
            self.heads,
            width // self.heads,
            kernel_init=_JOINT_KERNEL_INITS[self.kernel_init],
            out_init=last["kernel_init"],
            bias_init=last["bias_init"],
            implementation=self.implementation,
            name="attention",
            **types,
        )
        y = group_norm(self.groups, self.norm_epsilon, name="norm", **types)(x)
        return shard_rows(x + attention(y.reshape(len(x), -1, width)).reshape(x.shape))


class Downsample(nn.Module):
    """Halves height and width by a 3x3 convolution of stride 2 that keeps the number of channels.

    Attributes:
      padding: zeros before and behind, in both directions: (1, 1) in latent diffusion's UNets; (0, 1) in DDPM, as
        TensorFlow pads, and in latent diffusion's autoencoders.
      kernel_init: a key of `KERNEL_INITS`.
      zero_init: the bias starts at 0; else as in PyTorch.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    padding: tuple[int, int] = (1, 1)
    kernel_init: str = "fan_in"
    zero_init: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Applies the layer."""
        start = start_of(9 * x.shape[-1], self.kernel_init, self.zero_init)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        padding = (self.padding, self.padding)
        return Conv(x.shape[-1], (3, 3), 2, padding=padding, **start, name="conv", **types)(x)


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, and a 3x3 convolution that keeps the number of channels.

    Attributes:
      kernel_init: a key of `KERNEL_INITS`.
      zero_init: the bias starts at 0; else as in PyTorch.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    kernel_init: str = "fan_in"
    zero_init: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Applies the layer."""
        start = start_of(9 * x.shape[-1], self.kernel_init, self.zero_init)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return UpsampledConv(x.shape[-1], (3, 3), **start, name="conv", **types)(x)
