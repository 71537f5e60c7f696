"""The first stages of latent diffusion: convolutional autoencoders with a Gaussian or a vector-quantized bottleneck.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 and appendix G; the
trunk is that of Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis".

Both have `encode`, whose result is what `decode` takes but for a step between: of moments a Gaussian's mean or a draw
from it (`posterior`), of vectors the nearest codes (`quantize`, then `lookup`). What a second stage learns is what
`normalize` makes of latents.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from models.layers.convolution import Conv
from models.layers.group_norm_resnet import (
    AttentionBlock,
    Downsample,
    ResidualBlock,
    Upsample,
    group_norm,
    start_of,
)
from models.layers.partitioning import shard_rows
from models.layers.quantizer import nearest_code, straight_through
from models.layers.transformer import REMAT, check_remat

# What a logarithm of a variance is clipped to, before anything is made of it.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


def posterior(moments: Float[Array, "*n m"]) -> tuple[Float[Array, "*n c"], Float[Array, "*n c"]]:
    """Mean and logarithm of the variance of the Gaussian of each latent, of what `KLAutoencoder.encode` gives."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)


def draw_posterior(moments: Float[Array, "b h w m"], keys: Key[Array, "b"]) -> Float[Array, "b h w c"]:
    """A draw from the Gaussian of each latent, of what `KLAutoencoder.encode` gives, by one key an example."""
    mean, log_variance = posterior(moments)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return mean + jnp.exp(0.5 * log_variance) * noise


class _Side(nn.Module):
    """What encoder and decoder are built of; all layers start as PyTorch's do.

    Attributes:
      features: channels of the output.
      widths: channels of each level, the finest first.
      blocks: residual blocks of a level.
      attention_levels: indices of levels with attention behind each residual block.
      groups: of group normalization, whose epsilon is 1e-6.
      implementation: of attention.
      remat: what each block recomputes in the backward pass.
      dtype: of all but the output convolution, which is float32.
      param_dtype: of the parameters.
    """

    features: int
    widths: tuple[int, ...]
    blocks: int
    attention_levels: tuple[int, ...]
    groups: int
    implementation: str
    remat: str
    dtype: DTypeLike
    param_dtype: DTypeLike

    def conv(self, name: str, inputs: int, features: int, dtype: DTypeLike | None = None) -> nn.Module:
        """A 3x3 convolution."""
        types = {"dtype": self.dtype if dtype is None else dtype, "param_dtype": self.param_dtype}
        return Conv(features, (3, 3), **start_of(9 * inputs, zero_init=False), name=name, **types)

    def level(self, way: str, level: int, blocks: int, x: Array) -> Array:
        """Residual blocks to a level's channels, with attention behind each where the level has it."""
        for i in range(blocks):
            x = self._residual(f"{way}_{level}_residual_{i}", self.widths[level], x)
            if level in self.attention_levels:
                x = self._attend(f"{way}_{level}_attention_{i}", x)
        return x

    def middle(self, x: Array) -> Array:
        """Two residual blocks with attention between."""
        x = self._residual("mid_residual_0", self.widths[-1], x)
        return self._residual("mid_residual_1", self.widths[-1], self._attend("mid_attention", x))

    def activated(self, x: Array) -> Array:
        """What the output convolution is given, float32."""
        types = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        return nn.silu(group_norm(name="output_norm", **self.norm, **types)(x))

    @property
    def norm(self) -> dict[str, Any]:
        """Of every normalization."""
        return {"groups": self.groups, "epsilon": 1e-6}

    @property
    def types(self) -> dict[str, Any]:
        """Of every layer but the last."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _residual(self, name: str, features: int, x: Array) -> Array:
        fields = {"groups": self.groups, "norm_epsilon": 1e-6, "zero_init": False, "name": name, **self.types}
        return self._rematerialized(ResidualBlock)(features, **fields)(x)

    def _attend(self, name: str, x: Array) -> Array:
        fields = {"groups": self.groups, "norm_epsilon": 1e-6, "zero_init": False, "name": name, **self.types}
        return self._rematerialized(AttentionBlock)(implementation=self.implementation, **fields)(x)

    def _rematerialized(self, block: type[nn.Module]) -> Any:
        return block if self.remat == "none" else nn.remat(block, policy=REMAT[self.remat])


class Encoder(_Side):
    """Convolution, levels from the finest to the coarsest, the middle, norm, SiLU, convolution."""

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w {self.features}"]:
        """Encodes images; between levels a side of n pixels becomes one of n // 2."""
        x = shard_rows(images.astype(self.dtype))
        x = self.conv("input", x.shape[-1], self.widths[0])(x)
        for level in range(len(self.widths)):
            if level:
                fields = {"zero_init": False, "name": f"down_{level - 1}_resample", **self.types}
                x = shard_rows(Downsample((0, 1), **fields)(x))
            x = self.level("down", level, self.blocks, x)
        x = self.activated(self.middle(x))
        return self.conv("output", self.widths[-1], self.features, jnp.float32)(x)


class Decoder(_Side):
    """Convolution, the middle, levels from the coarsest to the finest, norm, SiLU, convolution.

    A level has one residual block more than the encoder's.
    """

    def setup(self) -> None:
        """Builds the last layer, which is of use without the others; see `pixels`."""
        self.output = self.conv("output", self.widths[0], self.features, jnp.float32)

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W {self.widths[0]}"]:
        """Decodes up to the last layer."""
        x = shard_rows(z.astype(self.dtype))
        x = self.middle(self.conv("input", x.shape[-1], self.widths[-1])(x))
        for level in reversed(range(len(self.widths))):
            x = self.level("up", level, self.blocks + 1, x)
            if level:
                fields = {"zero_init": False, "name": f"up_{level}_resample", **self.types}
                x = shard_rows(Upsample(**fields)(x))
        return self.activated(x)

    def pixels(self, features: Float[Array, "b H W c"]) -> Float[Array, "b H W {self.features}"]:
        """The last layer."""
        return shard_rows(self.output(features))


class Autoencoder(nn.Module):
    """What both kinds share: sizes and trunk. Defaults are those of Stable Diffusion.

    Level i has pictures smaller by 2^i `patch_size`, of `width * multipliers[i]` channels.

    Attributes:
      image_size: height and width of the pictures that it is made for; others work too.
      channels: of pictures.
      width: what `multipliers` multiply.
      multipliers: of each level, the finest first.
      attention_levels: indices of levels with attention behind each residual block, in encoder and decoder; the middle
        has one in any case.
      blocks: residual blocks of a level of the encoder; the decoder has one more.
      patch_size: side of the squares of pixels that are folded into channels first and unfolded last, so that level 0
        is that much coarser, which suits a CPU; 1 in what is published.
      latent_channels: of latents, or of codes.
      latent_shift: what `normalize` subtracts from latents.
      latent_scale: what it multiplies them by then, as published; None for what training measured, see
        `LatentStatistics`, and no `latent_shift`.
      groups: of group normalization.
      implementation: of attention, see `models.layers.attention.attend`.
      remat: what each block recomputes in the backward pass, for memory; see `models.layers.transformer.REMAT`.
      dtype: of the computation; both outputs, statistics, scores and softmax are float32 in any case.
      param_dtype: of the parameters.
    """

    # Fine-tuning may begin at weights that were made for other sizes, or whose latents were scaled otherwise.
    ADAPTABLE: ClassVar[tuple[str, ...]] = ("image_size", "latent_shift", "latent_scale")

    image_size: int = 256
    channels: int = 3
    width: int = 128
    multipliers: tuple[int | float, ...] = (1, 2, 4, 4)
    attention_levels: tuple[int, ...] = ()
    blocks: int = 2
    patch_size: int = 1
    latent_channels: int = 4
    latent_shift: float = 0.0
    latent_scale: float | None = None
    groups: int = 32
    implementation: str = "auto"
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def encoded_channels(self) -> int:
        """Channels of what the encoder gives: those of latents, unless it says more of each."""
        return self.latent_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(self.width * multiplier) for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels of a picture over those of its latents, along a side."""
        # Sizes that make no network are named when it is built; whoever divides by this comes before.
        return max(self.patch_size, 1) * 2 ** max(len(self.multipliers) - 1, 0)

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.image_size, self.image_size, self.channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    def setup(self) -> None:
        """Builds the trunk."""
        self._check_fields()
        shared: dict[str, Any] = {
            "widths": self.widths,
            "blocks": self.blocks,
            "attention_levels": self.attention_levels,
            "groups": self.groups,
            "implementation": self.implementation,
            "remat": self.remat,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        types = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        given, taken = self.encoded_channels, self.latent_channels
        self.encoder = Encoder(given, **shared)
        self.decoder = Decoder(self.channels * self.patch_size**2, **shared)
        self.quant = Conv(given, (1, 1), **start_of(given, zero_init=False), **types)
        self.post_quant = Conv(taken, (1, 1), **start_of(taken, zero_init=False), **types)
        self.latents = LatentStatistics()

    def adapt(self, params: Any, theirs: "Autoencoder") -> Any:
        """Parameters of a network that differs in `ADAPTABLE`, as they are: no shape and no layer follows those."""
        del theirs
        return params

    def encode(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w {self.encoded_channels}"]:
        """Encodes images in [-1, 1], float32; each side of a picture is halved, and floored, once a level but one.

        Raises:
          ValueError: if the images have other channels, or a side that patches do not divide or too short for a latent.
        """
        height, width, channels = images.shape[1:]
        if channels != self.channels:
            raise ValueError(f"pictures have {channels} channels, the network's channels are {self.channels}")
        if min(height, width) < self.downsampling:
            raise ValueError(f"pictures are {height} x {width}; a latent stands for {self.downsampling} pixels a side")
        if math.gcd(height, width) % self.patch_size:
            raise ValueError(f"pictures are {height} x {width}, which patches of {self.patch_size} do not divide")
        return self.quant(self.encoder(rearrange(images, "b (h p) (w q) c -> b h w (p q c)", **self._patch)))

    def features(self, z: Float[Array, "b h w {self.latent_channels}"]) -> Float[Array, "b h2 w2 f"]:
        """Decodes up to the last layer, float32."""
        return self.decoder(self.post_quant(z))

    def pixels(self, features: Float[Array, "b h2 w2 f"]) -> Float[Array, "b H W {self.channels}"]:
        """The last layer of decoding, a convolution; its parameters are `decoder/output`."""
        return rearrange(self.decoder.pixels(features), "b h w (p q c) -> b (h p) (w q) c", **self._patch)

    def decode(self, z: Float[Array, "b h w {self.latent_channels}"]) -> Float[Array, "b H W {self.channels}"]:
        """Images of latents, float32; around [-1, 1], not clipped. H = h * downsampling."""
        return self.pixels(self.features(z))

    def normalize(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Latents as a second stage learns them: shifted, then multiplied, to a standard deviation of about 1."""
        shift, scale = self._normalization()
        return (z - shift) * scale

    def denormalize(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The inverse of `normalize`."""
        shift, scale = self._normalization()
        return z / scale + shift

    @property
    def _patch(self) -> dict[str, int]:
        return {"p": self.patch_size, "q": self.patch_size}

    def _normalization(self) -> tuple[Array | float, Array | float]:
        return self.latents() if self.latent_scale is None else (self.latent_shift, self.latent_scale)

    def _check_fields(self) -> None:
        """Raises ValueError if the network cannot be built."""
        if self.latent_scale is None and self.latent_shift:
            raise ValueError(f"latent_shift={self.latent_shift} needs a latent_scale; without one both are measured")
        scale: Any = self.latent_scale
        if scale is not None and not (isinstance(scale, int | float) and scale > 0):
            raise ValueError(f"latent_scale={scale!r} must be above 0")
        check_remat(self.remat)
        levels = len(self.multipliers)
        if not levels:
            raise ValueError("multipliers is empty; it has a number for each level")
        if unknown := [level for level in self.attention_levels if not 0 <= level < levels]:
            raise ValueError(f"attention_levels has {unknown[0]}; the levels of multipliers are 0 to {levels - 1}")
        if self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size} must be at least 1, one pixel")
        if wrong := [width for width in self.widths if width % self.groups]:
            raise ValueError(f"groups={self.groups} does not divide the {wrong[0]} channels of a level")


class KLAutoencoder(Autoencoder):
    """Latents are draws from a diagonal Gaussian, kept near the standard one (kl-f4, kl-f8, kl-f16, kl-f32)."""

    @property
    def encoded_channels(self) -> int:
        """A mean and a logarithm of a variance of each latent."""
        return 2 * self.latent_channels

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h2 w2 c"]:
        """Images of the mean latents; touches every parameter."""
        mean, _ = posterior(self.encode(images))
        if self.is_initializing():
            self.normalize(mean)
        return self.decode(mean)


class VQAutoencoder(Autoencoder):
    """Latents are the nearest vectors of a codebook, a parameter (vq-f4, vq-f8, vq-f16).

    Latent diffusion learns what `encode` gives, and looks for the nearest codes when it decodes.

    Attributes:
      vocab_size: number of codes.
      code_range: r of U(-r, r), at which codes start; None for the published 1 / vocab_size. Codes that start as far
        apart as encoder outputs are used sooner, which small budgets need.
    """

    vocab_size: int = 8192
    code_range: float | None = None

    @property
    def token_grid(self) -> tuple[int, int]:
        """Height and width of the grid of tokens of one image.

        Raises:
          ValueError: if the image does not divide into it.
        """
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of {self.downsampling}, the pixels of one token"
            )
        return self.image_size // self.downsampling, self.image_size // self.downsampling

    def setup(self) -> None:
        """Builds the trunk and the codebook."""
        super().setup()
        edge = 1 / self.vocab_size if self.code_range is None else self.code_range
        self.codebook = Codebook(self.vocab_size, self.latent_channels, edge, self.param_dtype)

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h2 w2 c"]:
        """Images of the nearest codes; a straight-through gradient touches every parameter but the codebook."""
        z = self.encode(images)
        if self.is_initializing():
            self.normalize(z)
        return self.decode(straight_through(z, self.lookup(self.quantize(z))))

    def quantize(self, z: Float[Array, "b h w e"]) -> Int[Array, "b h w"]:
        """Tokens: the nearest code of each vector, the first of equals."""
        return nearest_code(z, self.codebook())

    def lookup(self, tokens: Int[Array, "b h w"]) -> Float[Array, "b h w {self.latent_channels}"]:
        """Codes of tokens, with a gradient to the codebook."""
        return self.codebook()[tokens]

    def tokenize(self, images: Float[Array, "b H W c"]) -> Int[Array, "b h w"]:
        """Tokens of images in [-1, 1]."""
        return self.quantize(self.encode(images))

    def decode_tokens(self, tokens: Int[Array, "b h w"]) -> Float[Array, "b H W {self.channels}"]:
        """Images of tokens, not clipped."""
        return self.decode(self.lookup(tokens))


class LatentStatistics(nn.Module):
    """What was measured of latents, over all channels: the collection `statistics`.

    Training measures them anew, of the weights that are used, whenever it saves, but where a signal ends it; see
    `measure_latents`. Zero `count` means that nothing was measured yet.
    """

    @nn.compact
    def __call__(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Their mean, and one over their standard deviation."""
        mean = self.variable("statistics", "mean", jnp.zeros, ()).value
        square = self.variable("statistics", "square", jnp.ones, ()).value
        self.variable("statistics", "count", jnp.zeros, ())
        return mean, jax.lax.rsqrt(jnp.maximum(square - mean**2, 1e-12))


def measure_latents(
    statistics: Mapping[str, Float[Array, ""]], z: Float[Array, "b h w c"]
) -> dict[str, Float[Array, ""]]:
    """Adds a batch of latents to `LatentStatistics`, in which all batches count alike.

    Args:
      statistics: mean, square (the mean of squares) and count (of batches) so far.
      z: latents before `normalize`.
    """
    share = 1 / (statistics["count"] + 1)
    return {
        "mean": statistics["mean"] + share * (jnp.mean(z) - statistics["mean"]),
        "square": statistics["square"] + share * (jnp.mean(jnp.square(z)) - statistics["square"]),
        "count": statistics["count"] + 1,
    }


class Codebook(nn.Module):
    """A table of vectors.

    Attributes:
      vocab_size: number of vectors.
      features: width of one.
      edge: they start between this and its negative.
      param_dtype: of the table.
    """

    vocab_size: int
    features: int
    edge: float
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> Float[Array, "{self.vocab_size} {self.features}"]:
        """The table, float32."""

        def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return jax.random.uniform(key, shape, dtype, -self.edge, self.edge)

        return self.param("embedding", init, (self.vocab_size, self.features), self.param_dtype).astype(jnp.float32)
