"""Reconstructions of images through an image tokenizer: image -> tokens -> image, as stage 2 sees them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict

from models.dvae import DiscreteVAE, VectorQuantizedVAE
from sample.samplers.from_config import build_network


def from_uint8(images: UInt8[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """Maps bytes 0..255 to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True)
class ReconstructionSampler:
    """Encodes images to tokens and decodes the tokens.

    Attributes:
      model: the tokenizer, part `dvae` of the parameters.
    """

    model: DiscreteVAE | VectorQuantizedVAE

    @classmethod
    def from_config(cls, config: ConfigDict) -> "ReconstructionSampler":
        """Builds the sampler of the network that `config.models.dvae` describes."""
        return cls(model=build_network(config, "models.dvae"))

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows that a request holds."""
        return ("image",)

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs hold."""
        return ("image", "tokens")

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
          params: `params["dvae"]` is the tokenizer's tree.
          variables: `variables["dvae"]` holds its collections; a discrete VAE has none and needs no entry.
          frozen: not used.
          request: {"image": uint8 [b h w c]}.
          keys: not used: nothing is drawn.

        Returns:
          image: float [b h w c] in [-1, 1].
          tokens: int32 [b h w], the token grid.
        """
        del frozen, keys
        return _reconstruct(self.model, {"params": params["dvae"], **variables.get("dvae", {})}, request["image"])


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(
    model: DiscreteVAE | VectorQuantizedVAE, tree: Any, images: UInt8[Array, "b h w c"]
) -> dict[str, Array]:
    tokens = model.apply(tree, from_uint8(images), method="tokenize")
    return {"image": model.apply(tree, tokens, method="decode_tokens"), "tokens": tokens}
