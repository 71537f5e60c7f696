"""The discrete VAE of the dalle_pytorch package: strided convolutions down, transposed ones up, and a codebook between.

It is another network than that of Ramesh et al. 2021 (`models.dvae`): no pooling, no logit-Laplace density, pixels as
they are. No objective here trains one: it comes in with a DALL-E of that package, and is its image tokenizer.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions and one of single pixels, ReLU between, and what came in."""

    features: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w {self.features}"]) -> Float[Array, "b h w {self.features}"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.relu(nn.Conv(self.features, (3, 3), name="conv_0", **types)(x))
        y = nn.relu(nn.Conv(self.features, (3, 3), name="conv_1", **types)(y))
        return x + nn.Conv(self.features, (1, 1), name="conv_2", **types)(y)


class StridedDiscreteVAE(nn.Module):
    """Categorical codes; defaults are the package's.

    Attributes:
      image_size: height and width of the images, in pixels.
      channels: of the images.
      vocab_size: number of codes.
      code_dim: width of a code.
      width: channels of all layers between.
      levels: how often a side is halved.
      blocks: residual blocks at the coarsest level, of encoder and decoder each.
      pixel_mean: of each channel, what is subtracted from pixels in [0, 1].
      pixel_std: of each channel, what they are divided by then; the decoder gives pixels like these.
      dtype: of the computation; logits and pixels are float32 in any case.
      param_dtype: of the parameters.
    """

    image_size: int = 256
    channels: int = 3
    vocab_size: int = 512
    code_dim: int = 512
    width: int = 64
    levels: int = 3
    blocks: int = 0
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def token_grid(self) -> tuple[int, int]:
        """Height and width of the grid of tokens of one image.

        Raises:
          ValueError: if the image does not divide into it.
        """
        if self.image_size % 2**self.levels:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of {2**self.levels}, the pixels of one token"
            )
        return self.image_size // 2**self.levels, self.image_size // 2**self.levels

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.image_size, self.image_size, self.channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    def setup(self) -> None:
        """Builds all layers."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        ends = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        strided = {"kernel_size": (4, 4), "strides": (2, 2)}
        self.down = [nn.Conv(self.width, padding=((1, 1), (1, 1)), **strided, **types) for _ in range(self.levels)]
        self.down_block = [_ResidualBlock(self.width, **types) for _ in range(self.blocks)]
        self.logits = nn.Conv(self.vocab_size, (1, 1), precision=jax.lax.Precision.HIGHEST, **ends)
        self.codebook = nn.Embed(self.vocab_size, self.code_dim, **types)
        if self.blocks:
            self.input = nn.Conv(self.width, (1, 1), **types)
        self.up_block = [_ResidualBlock(self.width, **types) for _ in range(self.blocks)]
        self.up = [
            nn.ConvTranspose(self.width, padding=((2, 2), (2, 2)), **strided, **types) for _ in range(self.levels)
        ]
        self.output = nn.Conv(self.channels, (1, 1), **ends)

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Images of the expected code, softmax(logits): no noise; touches every parameter."""
        if self.is_initializing():
            self.codebook(jnp.zeros((1, 1, 1), jnp.int32))
        return self._pictures(jax.nn.softmax(self.encode(images)) @ self.codebook.embedding)

    def encode(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w {self.vocab_size}"]:
        """Logits of the codes of images in [-1, 1], float32.

        Raises:
          ValueError: if the images do not divide into tokens, or have other `channels`.
        """
        height, width, channels = images.shape[1:]
        if height % 2**self.levels or width % 2**self.levels or channels != self.channels:
            raise ValueError(
                f"images of height, width, channels {images.shape[1:]} given to a tokenizer of {self.channels} "
                f"channels, whose tokens are {2**self.levels} x {2**self.levels} pixels"
            )
        x = ((images + 1) / 2 - jnp.asarray(self.pixel_mean)) / jnp.asarray(self.pixel_std)
        for layer in self.down:
            x = nn.relu(layer(x))
        for block in self.down_block:
            x = block(x)
        return self.logits(x)

    def tokenize(self, images: Float[Array, "b H W c"]) -> Int[Array, "b h w"]:
        """Tokens of images in [-1, 1]: the most likely code, the first of equals."""
        return jnp.argmax(self.encode(images), axis=-1).astype(jnp.int32)

    def decode_tokens(self, tokens: Int[Array, "b h w"]) -> Float[Array, "b H W c"]:
        """Images of tokens, around [-1, 1], not clipped."""
        return self._pictures(self.codebook(tokens))

    def _pictures(self, x: Float[Array, "b h w e"]) -> Float[Array, "b H W c"]:
        """Decodes codes."""
        if self.blocks:
            x = self.input(x)
        for block in self.up_block:
            x = block(x)
        for layer in self.up:
            x = nn.relu(layer(x))
        return 2 * (self.output(x) * jnp.asarray(self.pixel_std) + jnp.asarray(self.pixel_mean)) - 1
