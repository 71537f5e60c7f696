"""Features of pictures and captions in CLIP's joint embedding."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from models.clip import Clip
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network


@dataclasses.dataclass(frozen=True)
class ClipSampler:
    """Embeds pictures, captions, or both.

    Attributes:
      model: the network, part `clip` of the parameters.
    """

    model: Clip

    @classmethod
    def from_config(cls, config: ConfigDict) -> "ClipSampler":
        """Builds the sampler of the network that `config.models.clip` describes."""
        return cls(model=build_network(config, "models.clip"))

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows that a request may hold."""
        return ("text", "image")

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs hold."""
        return ("features",)

    @property
    def settings(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def request(
        self, image: UInt8[np.ndarray, "b h w 3"] | None = None, text: Int[np.ndarray, "b l"] | None = None
    ) -> dict[str, np.ndarray]:
        """What `__call__` takes as `request`.

        Args:
          image: pictures of the network's size.
          text: caption ids.

        Raises:
          UserError: if a caption has no end token, where its features would be read.
        """
        if text is not None:
            without = np.flatnonzero(~np.any(text == self.model.text_end_id, axis=1))
            if len(without):
                raise UserError(
                    f"caption {without[0]} of {len(text)} has no end token (id {self.model.text_end_id}); "
                    "encode captions with the tokenizer of the run"
                )
        given = {"image": image, "text": text}
        return {name: value for name, value in given.items() if value is not None}

    def __call__(
        self, params: Any, variables: Any, frozen: Any, request: dict[str, Any], keys: Key[Array, "b"]
    ) -> dict[str, Float[Array, "b e"]]:
        """Embeds; deterministic and pure.

        Args:
          params: `params["clip"]` is the network's tree.
          variables: `variables["clip"]` holds its collections; a ViT has none and needs no entry.
          frozen: not used.
          request: {"image": uint8 [b h w 3]}, {"text": int32 [b l]}, or both.
          keys: not used: nothing is drawn.

        Returns:
          image_features, text_features: of what was given, of unit length.
        """
        del frozen, keys
        # A network that was trained with a fused kernel embeds on any device.
        return _embed(
            self.model.clone(implementation="xla"), {"params": params["clip"], **variables.get("clip", {})}, request
        )


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: Clip, tree: Any, request: dict[str, Array]) -> dict[str, Float[Array, "b e"]]:
    features = {}
    if "image" in request:
        features["image_features"] = model.apply(tree, from_uint8(request["image"]), method="embed_images")
    if "text" in request:
        features["text_features"] = model.apply(tree, request["text"], method="embed_text")
    return features
