"""Pictures to the tokens that a second stage learns, and back, whichever network makes them.

An image tokenizer is any network with `vocab_size` and `token_grid`, and through `apply` the methods `tokenize` and
`decode_tokens`: the discrete VAE of Ramesh et al. 2021, a VQ-VAE on its trunk (both `models.dvae`), or the
vector-quantized autoencoders of Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis"
(`models.autoencoder`), which public DALL-Es have in its place.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from cli.errors import UserError
from models import MODELS
from sample.samplers.from_config import build_network

Tree = Any

PART = "dvae"

# Pixels of pictures that are made at once: 64 pictures of 256 x 256. With convolutions at full resolution more take
# several GiB.
_PIXELS = 2**22


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """A frozen image tokenizer, `config.frozen.dvae`.

    Attributes:
      model: the network.
    """

    model: nn.Module

    @classmethod
    def from_config(cls, config: ConfigDict) -> "ImageTokens":
        """The image tokenizer of a config.

        Raises:
          UserError: if there is none, it cannot be built, or makes no tokens of pictures of its size.
        """
        tokens = cls(build_network(config, f"frozen.{PART}"))
        if not _makes_tokens(type(tokens.model)):
            choices = ", ".join(name for name, model in MODELS.items() if _makes_tokens(model))
            name = config.frozen[PART].name
            raise UserError(f"config.frozen.{PART} is a {name!r}, which makes no tokens; one of {choices} does")
        try:
            _ = tokens.grid
        except ValueError as error:
            raise UserError(f"config.frozen.{PART}: {error}") from error
        return tokens

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return self.model.vocab_size  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the tokens of a picture."""
        return tuple(self.model.token_grid)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a picture."""
        return self.model.example_inputs(1)[0].shape[1:]  # pyright: ignore[reportAttributeAccessIssue]

    def encode(self, frozen: Tree, images: Float[Array, "b H W c"]) -> Int[Array, "b h w"]:
        """Tokens of images in [-1, 1]; nothing is drawn.

        Args:
          frozen: {"dvae": {"params": tree, "variables": collections}, ...}.
          images: the pictures.
        """
        return self.model.apply(_variables(frozen), images, method="tokenize")

    def decode(self, frozen: Tree, tokens: Int[Array, "b h w"]) -> Float[Array, "b H W c"]:
        """Images in [-1, 1], clipped, of tokens."""
        tree = _variables(frozen)

        def decode(tokens: Array) -> Array:
            return jnp.clip(self.model.apply(tree, tokens, method="decode_tokens"), -1, 1)

        height, width, _ = self.picture_shape
        at_once = max(1, _PIXELS // (height * width))
        if len(tokens) <= at_once:
            return decode(tokens)
        return jax.lax.map(lambda one: decode(one[None])[0], tokens, batch_size=at_once)


def _makes_tokens(model: type[nn.Module]) -> bool:
    return all(hasattr(model, name) for name in ("token_grid", "tokenize", "decode_tokens"))


def _variables(frozen: Tree) -> Tree:
    return {"params": frozen[PART]["params"], **frozen[PART]["variables"]}
