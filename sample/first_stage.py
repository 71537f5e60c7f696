"""Pictures to the latents that a second stage learns, and back: the only place where a latent is scaled.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 and appendix G: latents
are divided by their standard deviation, as published or as measured of the training set (`models.autoencoder`).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from diffusion.process import Process
from models.autoencoder import KLAutoencoder, VQAutoencoder, draw_posterior, posterior
from sample.samplers.from_config import build_network

Tree = Any

PART = "first_stage"

# Pixels of pictures that are decoded at once: 16 pictures of 512 x 512, which take several GiB.
_PIXELS = 2**22


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """A frozen autoencoder, `config.frozen.first_stage`.

    Attributes:
      model: the network.
    """

    model: KLAutoencoder | VQAutoencoder

    @classmethod
    def from_config(cls, config: ConfigDict) -> "FirstStage | None":
        """The first stage of a config; None if it has none.

        Raises:
          UserError: if it is no autoencoder, or cannot be built.
        """
        if PART not in config.frozen:
            return None
        model = build_network(config, f"frozen.{PART}")
        if not isinstance(model, KLAutoencoder | VQAutoencoder):
            name = config.frozen[PART].name
            raise UserError(f"config.frozen.{PART} is a {name!r}; it must be an autoencoder_kl or an autoencoder_vq")
        return cls(model)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Height, width and channels of the latents of a square picture.

        Raises:
          UserError: if pictures of that size would not come back as large.
        """
        factor = self.model.downsampling
        if image_size % factor:
            raise UserError(
                f"config.data.image_size={image_size} is not a multiple of {factor}, the pixels of a latent of "
                f"config.frozen.{PART}"
            )
        return image_size // factor, image_size // factor, self.model.latent_channels

    def encode(self, frozen: Tree, images: Float[Array, "b H W c"], keys: Key[Array, "b"]) -> Float[Array, "b h w z"]:
        """Latents of images in [-1, 1], as a second stage learns them.

        Args:
          frozen: {"first_stage": {"params": tree, "variables": collections}, ...}.
          images: the pictures.
          keys: of the draws from each latent's Gaussian; a model with a codebook draws nothing, and gives what it has
            before its codes are looked for.
        """
        return self.draw(frozen, self.moments(frozen, images), keys)

    def moments(self, frozen: Tree, images: Float[Array, "b H W c"]) -> Float[Array, "b h w m"]:
        """What is deterministic of `encode`: mean and logarithm of the variance, or vectors; not scaled."""
        return self.model.apply(_variables(frozen), images, method="encode")

    def draw(self, frozen: Tree, moments: Float[Array, "b h w m"], keys: Key[Array, "b"]) -> Float[Array, "b h w z"]:
        """Latents of what `moments` gives; see `encode`."""
        z = draw_posterior(moments, keys) if isinstance(self.model, KLAutoencoder) else moments
        return self.model.apply(_variables(frozen), z, method="normalize")

    def mean(self, frozen: Tree, images: Float[Array, "b H W c"]) -> Float[Array, "b h w z"]:
        """As `encode`, with nothing drawn: the mean of each latent's Gaussian, whose decoding is the reconstruction."""
        z = self.moments(frozen, images)
        if isinstance(self.model, KLAutoencoder):
            z, _ = posterior(z)
        return self.model.apply(_variables(frozen), z, method="normalize")

    def decode(self, frozen: Tree, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        """Images in [-1, 1], clipped, of latents as a second stage makes them."""
        tree = _variables(frozen)

        def decode(z: Array) -> Array:
            z = self.model.apply(tree, z, method="denormalize")
            if isinstance(self.model, VQAutoencoder):
                z = self.model.apply(tree, self.model.apply(tree, z, method="quantize"), method="lookup")
            return jnp.clip(self.model.apply(tree, z, method="decode"), -1, 1)

        pixels = z.shape[1] * z.shape[2] * self.model.downsampling**2
        at_once = max(1, _PIXELS // pixels)
        if len(z) <= at_once:
            return decode(z)
        return jax.lax.map(lambda one: decode(one[None])[0], z, batch_size=at_once)


def _variables(frozen: Tree) -> Tree:
    return {"params": frozen[PART]["params"], **frozen[PART]["variables"]}


def check_denoiser(config: ConfigDict, model: nn.Module, process: Process, first_stage: FirstStage | None) -> None:
    """Raises UserError unless the denoiser is of what the first stage makes, or of pixels without one."""
    channels = getattr(model, "in_channels", 3)
    if first_stage is None:
        if channels != 3:
            raise UserError(
                f"the denoiser is of latents of {channels} channels; name what decodes them as "
                "config.frozen.first_stage, {'name', 'source', 'part'}"
            )
        return
    if process.clip:
        raise UserError("config.process.clip cuts estimates off at -1 and 1, where latents do not end; set it to False")
    side, _, needed = first_stage.latent_shape(config.data.image_size)
    size = getattr(model, "image_size", side)
    if (size, channels) != (side, needed):
        raise UserError(
            f"the denoiser is of {size} x {size} x {channels}, and config.frozen.first_stage makes {side} x {side} x "
            f"{needed} of pictures of {config.data.image_size} pixels; set config.models.denoiser.image_size and "
            "in_channels to that"
        )
