"""Image tokenizers, stage 1 of DALL-E: the discrete VAE (Ramesh et al. 2021, App. A) and a VQ-VAE on the same trunk.

Stage 2 sees the same interface of both: `vocab_size`, `token_grid`, and through `apply` the methods `tokenize` and
`decode_tokens`; the vector-quantized autoencoders have it too.

Pixels. The logit-Laplace density has support (0, 1) without its ends, where logit(x) is infinite; but black and white
pixels are exactly 0 and 1. So images are mapped from [0, 1] to [EPS, 1 - EPS] before the encoder and before the
density, and a reconstruction is mapped back. EPS is this margin and nothing else: it neither smooths the loss nor is a
tolerance.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from models.layers.convolution import upsample_nearest
from models.layers.quantizer import nearest_code, straight_through
from models.layers.resnet import KERNEL_INIT, BottleneckBlock, conv

EPS = 0.1


def map_pixels(images: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """Maps images in [-1, 1] to [EPS, 1 - EPS], the domain of the encoder and of the logit-Laplace density."""
    return (1 - 2 * EPS) * (images + 1) / 2 + EPS


def unmap_pixels(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """The inverse of `map_pixels`, without clipping: (0, 1) to a range a little wider than [-1, 1]."""
    return 2 * (x - EPS) / (1 - 2 * EPS) - 1


class Encoder(nn.Module):
    """Groups of residual blocks with a 2x2 max pool between groups, then ReLU and a 1x1 convolution in float32.

    Attributes:
      features: channels of the output.
      hidden: width of the input convolution; a group has hidden * multiplier channels.
      width_multipliers: one per group.
      blocks_per_group: residual blocks of a group.
      input_kernel: kernel size of the first convolution.
      bottleneck: division of the width inside a block.
      dtype: of all but the output convolution.
      param_dtype: of the parameters.
    """

    features: int
    hidden: int
    width_multipliers: tuple[int, ...]
    blocks_per_group: int
    input_kernel: int
    bottleneck: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w {self.features}"]:
        """Encodes mapped pixels; h = H / 2^(groups - 1)."""
        layers = len(self.width_multipliers) * self.blocks_per_group
        x = conv(self.hidden, self.input_kernel, self.dtype, self.param_dtype, "input")(x)
        for group, multiplier in enumerate(self.width_multipliers, start=1):
            if group > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for block in range(1, self.blocks_per_group + 1):
                x = BottleneckBlock(
                    self.hidden * multiplier,
                    kernels=(3, 3, 3, 1),
                    bottleneck=self.bottleneck,
                    gain=1 / layers**2,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    name=f"group_{group}_block_{block}",
                )(x)
        return conv(self.features, 1, jnp.float32, self.param_dtype, "output")(nn.relu(x))


class CodeProjection(nn.Module):
    """The decoder's first 1x1 convolution, in float32: for a discrete VAE its kernel is the codebook.

    Attributes:
      inputs: channels of the codes (the vocabulary of a discrete VAE).
      features: channels of the output.
      stddev: of the initial kernel; None for the published 1 / sqrt(inputs).
      param_dtype: of the parameters.
    """

    inputs: int
    features: int
    stddev: float | None
    param_dtype: Any

    @nn.compact
    def __call__(
        self, codes: Float[Array, "b h w {self.inputs}"] | Int[Array, "b h w"]
    ) -> Float[Array, "b h w {self.features}"]:
        """Projects codes. Tokens give what their one-hot codes would, by a lookup instead of a product."""
        init = KERNEL_INIT if self.stddev is None else nn.initializers.normal(self.stddev)
        kernel = self.param("kernel", init, (self.inputs, self.features), self.param_dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(jnp.float32)
        if jnp.issubdtype(codes.dtype, jnp.integer):
            return kernel[codes] + bias
        return codes.astype(jnp.float32) @ kernel + bias


class Decoder(nn.Module):
    """The encoder in reverse: code projection, groups with nearest-neighbor doubling between them, ReLU and 1x1.

    Attributes:
      inputs: channels of the codes.
      features: channels of the output.
      initial: width of the code projection.
      hidden, width_multipliers, blocks_per_group, bottleneck: as for `Encoder`; the multipliers are read backwards.
      code_stddev: of the initial code projection; None for the published value.
      dtype: of all but the code projection and the output convolution, which are float32.
      param_dtype: of the parameters.
    """

    inputs: int
    features: int
    initial: int
    hidden: int
    width_multipliers: tuple[int, ...]
    blocks_per_group: int
    bottleneck: int
    code_stddev: float | None
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, codes: Float[Array, "b h w {self.inputs}"] | Int[Array, "b h w"]
    ) -> Float[Array, "b H W {self.features}"]:
        """Decodes codes, or tokens in place of one-hot codes; H = h * 2^(groups - 1)."""
        layers = len(self.width_multipliers) * self.blocks_per_group
        x = CodeProjection(self.inputs, self.initial, self.code_stddev, self.param_dtype, name="input")(codes)
        x = x.astype(self.dtype)
        for group, multiplier in enumerate(reversed(self.width_multipliers), start=1):
            if group > 1:
                x = upsample_nearest(x)
            for block in range(1, self.blocks_per_group + 1):
                x = BottleneckBlock(
                    self.hidden * multiplier,
                    kernels=(1, 3, 3, 3),
                    bottleneck=self.bottleneck,
                    gain=1 / layers**2,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    name=f"group_{group}_block_{block}",
                )(x)
        return conv(self.features, 1, jnp.float32, self.param_dtype, "output")(nn.relu(x))


class ImageTokenizer(nn.Module):
    """What both tokenizers share: sizes, trunk, and the mapping of pixels. Defaults are the published sizes.

    Attributes:
      image_size: height and width of the images, in pixels. Others that divide into tokens are taken too, and have
        another grid of them, which a second stage may not.
      channels: of the images.
      vocab_size: number of codes.
      encoder_hidden, decoder_hidden: width of the finest group.
      decoder_init: width of the decoder's first layer.
      width_multipliers: of the groups, finest first; images shrink by 2 between groups.
      blocks_per_group: residual blocks of a group.
      input_kernel: kernel size of the encoder's first convolution.
      patch_size: images are first cut to patches of this many pixels, each a vector (1: none, as published); with 4 and
        a single group a small network runs at token resolution, which suits a CPU.
      bottleneck: division of the width inside a residual block; 1 or 2 for narrow networks.
      code_stddev: of the decoder's initial code projection; None is the published 1 / sqrt(codes). A small network
        learns sooner with 1.0, where a one-hot code gives activations of unit scale.
      dtype: of the computation between the ends; both ends of the codes and the statistics are always float32.
      param_dtype: of the parameters.
    """

    image_size: int = 256
    channels: int = 3
    vocab_size: int = 8192
    encoder_hidden: int = 256
    decoder_hidden: int = 256
    decoder_init: int = 128
    width_multipliers: tuple[int, ...] = (1, 2, 4, 8)
    blocks_per_group: int = 2
    input_kernel: int = 7
    patch_size: int = 1
    bottleneck: int = 4
    code_stddev: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def code_channels(self) -> int:
        """Channels of what the encoder gives and the decoder takes."""
        raise NotImplementedError

    @property
    def token_grid(self) -> tuple[int, int]:
        """Height and width of the grid of tokens of one image.

        Raises:
          ValueError: if the image does not divide into it.
        """
        factor = self.patch_size * 2 ** (len(self.width_multipliers) - 1)
        if self.image_size % factor:
            raise ValueError(f"image_size={self.image_size} is not a multiple of {factor}, the pixels of one token")
        return self.image_size // factor, self.image_size // factor

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.image_size, self.image_size, self.channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    def setup(self) -> None:
        """Builds the trunk."""
        shared: dict[str, Any] = {
            "width_multipliers": self.width_multipliers,
            "blocks_per_group": self.blocks_per_group,
            "bottleneck": self.bottleneck,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        self.encoder = Encoder(self.code_channels, hidden=self.encoder_hidden, input_kernel=self.input_kernel, **shared)
        self.decoder = Decoder(
            self.code_channels,
            features=2 * self.channels * self.patch_size**2,
            initial=self.decoder_init,
            hidden=self.decoder_hidden,
            code_stddev=self.code_stddev,
            **shared,
        )

    def encode(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w {self.code_channels}"]:
        """Encodes images in [-1, 1]: logits of the codes (discrete VAE) or vectors (VQ-VAE), float32.

        Raises:
          ValueError: if the images do not divide into tokens, or have other `channels`.
        """
        height, width, channels = images.shape[1:]
        side = self.image_size // self.token_grid[0]
        if height % side or width % side or channels != self.channels:
            raise ValueError(
                f"images of height, width, channels {images.shape[1:]} given to a tokenizer of {self.channels} "
                f"channels, whose tokens are {side} x {side} pixels"
            )
        x = map_pixels(images)
        x = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=self.patch_size, q=self.patch_size)
        return self.encoder(x)

    def _decode(self, codes: Float[Array, "b h w n"] | Int[Array, "b h w"]) -> Float[Array, "b H W s"]:
        """Statistics of the pixels of codes, channels last: mu, then ln b."""
        stats = self.decoder(codes)
        return rearrange(stats, "b h w (p q s) -> b (h p) (w q) s", p=self.patch_size, q=self.patch_size)

    def reconstruction(self, stats: Float[Array, "b H W s"]) -> Float[Array, "b H W c"]:
        """Images in [-1, 1] of the decoder's statistics: sigmoid(mu), mapped back and clipped; ln b is not used."""
        return jnp.clip(unmap_pixels(jax.nn.sigmoid(stats[..., : self.channels])), -1, 1)


class DiscreteVAE(ImageTokenizer):
    """The discrete VAE of DALL-E: categorical codes, no codebook but the decoder's first layer."""

    @property
    def code_channels(self) -> int:
        """One channel per code."""
        return self.vocab_size

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b H W s"]:
        """Statistics of the pixels given the expected code, softmax(logits): no noise; touches every parameter."""
        return self.decode(jax.nn.softmax(self.encode(images)))

    def tokenize(self, images: Float[Array, "b H W c"]) -> Int[Array, "b h w"]:
        """Tokens of images in [-1, 1]: the most likely code, without Gumbel noise, as stage 2 is trained on."""
        return jnp.argmax(self.encode(images), axis=-1).astype(jnp.int32)

    def decode(self, codes: Float[Array, "b h w v"] | Int[Array, "b h w"]) -> Float[Array, "b H W s"]:
        """Statistics (mu, then ln b; s = 2 channels) of soft codes, or of tokens as if they were one-hot codes."""
        return self._decode(codes)

    def decode_tokens(self, tokens: Int[Array, "b h w"]) -> Float[Array, "b H W c"]:
        """Images in [-1, 1] of tokens."""
        return self.reconstruction(self.decode(tokens))


class VectorQuantizedVAE(ImageTokenizer):
    """A VQ-VAE (van den Oord et al. 2017) on the trunk of the discrete VAE.

    The codebook is the variable collection `codebook`, all float32, which the objective updates without a gradient:
    `embedding [v e]`; `usage [v]`, a moving average of how often each code was chosen per step; `sums [v e]`, the same
    of the sum of what was encoded to it. Zero `usage` everywhere means that the embedding is still random.

    Attributes:
      code_dim: width of a code.
    """

    code_dim: int = 32

    @property
    def code_channels(self) -> int:
        """The width of a code."""
        return self.code_dim

    def setup(self) -> None:
        """Builds the trunk and the codebook."""
        super().setup()
        shape = (self.vocab_size, self.code_dim)
        self._embedding = self.variable(
            "codebook", "embedding", lambda: jax.random.normal(self.make_rng("params"), shape)
        )
        self._usage = self.variable("codebook", "usage", jnp.zeros, shape[:1])
        self._sums = self.variable("codebook", "sums", jnp.zeros, shape)

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b H W s"]:
        """Statistics of the pixels given the nearest codes; a straight-through gradient touches every parameter."""
        z = self.encode(images)
        return self.decode(straight_through(z, self.lookup(self.quantize(z))))

    def quantize(self, z: Float[Array, "b h w e"]) -> Int[Array, "b h w"]:
        """Tokens: the nearest code of each vector."""
        return nearest_code(z, self._embedding.value)

    def lookup(self, tokens: Int[Array, "b h w"]) -> Float[Array, "b h w e"]:
        """Codes of tokens."""
        return self._embedding.value[tokens]

    def tokenize(self, images: Float[Array, "b H W c"]) -> Int[Array, "b h w"]:
        """Tokens of images in [-1, 1]."""
        return self.quantize(self.encode(images))

    def decode(self, vectors: Float[Array, "b h w e"]) -> Float[Array, "b H W s"]:
        """Statistics (mu, then ln b; s = 2 channels) of codes."""
        return self._decode(vectors)

    def decode_tokens(self, tokens: Int[Array, "b h w"]) -> Float[Array, "b H W c"]:
        """Images in [-1, 1] of tokens."""
        return self.reconstruction(self.decode(self.lookup(tokens)))
