"""Reconstructions of images through a first stage: image -> latents -> image, as latent diffusion decodes them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt8
from ml_collections import ConfigDict

from models.autoencoder import KLAutoencoder, VQAutoencoder, posterior
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network


@dataclasses.dataclass(frozen=True)
class AutoencoderSampler:
    """Encodes images and decodes their mean latents, or the codes nearest to their latents.

    Attributes:
      model: the first stage, part `autoencoder` of the parameters.
    """

    model: KLAutoencoder | VQAutoencoder

    @classmethod
    def from_config(cls, config: ConfigDict) -> "AutoencoderSampler":
        """Builds the sampler of the network that `config.models.autoencoder` describes."""
        return cls(model=build_network(config, "models.autoencoder"))

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows that a request holds."""
        return ("image",)

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs hold."""
        return ("image", "tokens") if isinstance(self.model, VQAutoencoder) else ("image",)

    @property
    def settings(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def request(self, image: UInt8[np.ndarray, "b h w c"]) -> dict[str, np.ndarray]:
        """What `__call__` takes as `request`; there are no settings."""
        return {"image": image}

    def __call__(
        self, params: Any, variables: Any, frozen: Any, request: dict[str, Any], keys: Key[Array, "b"]
    ) -> dict[str, Array]:
        """Reconstructs images; deterministic and pure.

        Args:
          params: `params["autoencoder"]` is the first stage's tree.
          variables: not used: what they hold of latents is for a second stage.
          frozen: not used.
          request: {"image": uint8 [b h w c]}.
          keys: not used: nothing is drawn.

        Returns:
          image: float [b h w c] in [-1, 1].
          tokens: int32 [b h w], the grid of codes, of a vector-quantized one.
        """
        del variables, frozen, keys
        return _reconstruct(self.model, {"params": params["autoencoder"]}, request["image"])


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(model: KLAutoencoder | VQAutoencoder, tree: Any, images: UInt8[Array, "b h w c"]) -> dict[str, Array]:
    encoded: Array = model.apply(tree, from_uint8(images), method="encode")
    if isinstance(model, KLAutoencoder):
        decoded = model.apply(tree, posterior(encoded)[0], method="decode")
        return {"image": jnp.clip(decoded, -1, 1)}
    tokens = model.apply(tree, encoded, method="quantize")
    decoded = model.apply(tree, tokens, method="decode_tokens")
    return {"image": jnp.clip(decoded, -1, 1), "tokens": tokens}
