"""Captions -> features of their tokens, which a diffusion is told: one door for training, sampling and what is stored.

Rombach et al. 2022, section 3.3, where a network trained with the denoiser reads captions; a frozen CLIP does in Stable
Diffusion.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from cli.errors import UserError
from models.clip import Clip
from models.clip_text import ClipText
from models.layers.attention import KeyLengths
from sample.prompts import MOST
from sample.samplers.from_config import build_network

Tree = Any


@dataclasses.dataclass(frozen=True)
class TextContext:
    """Where the features of captions come from.

    Attributes:
      model: the network.
      part: its name: "text", trained with the denoiser or frozen, or "clip", frozen.
      blank: ids of the caption that says nothing.
      frozen: whether it is not trained.
    """

    model: nn.Module
    part: str
    blank: tuple[int, ...]
    frozen: bool = False

    def __call__(self, params: Tree, frozen: Tree, text: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Features of each token; of captions that are several contexts long, one after another."""
        if (length := len(self.blank)) < text.shape[1]:
            return self(params, frozen, text.reshape(-1, length)).reshape(*text.shape, -1)
        if not self.frozen:
            return self.model.apply({"params": params[self.part]}, text)
        tree = frozen[self.part]
        return self.model.apply({"params": tree["params"], **tree["variables"]}, text, method="encode_text")


def create_text_context(config: ConfigDict, width: int | None) -> TextContext | None:
    """The network that reads captions, if the config has one.

    That is `config.models.text`, a text encoder or a CLIP's text tower alone, or `config.frozen.text`: such a tower, or
    a whole CLIP, which may be called `config.frozen.clip` too.

    Args:
      config: of the run.
      width: of the tokens that the denoiser reads; None for any.
    """
    places = [("models", "text"), ("frozen", "text"), ("frozen", "clip")]
    found = [f"{group}.{part}" for group, part in places if part in config[group]]
    if len(found) > 1:
        raise UserError(f"config.{' and config.'.join(found)} would both read captions; leave one out")
    if not found:
        return None
    model, part = build_network(config, found[0]), found[0].partition(".")[2]
    made = getattr(model, "width", None) or getattr(model, "text_width", None)
    if None not in (made, width) and made != width:
        raise UserError(
            f"the denoiser reads tokens of width {width}, and config.{found[0]} makes ones of width {made}; they must "
            "be equal"
        )
    trained = found[0] == "models.text"
    if trained and not isinstance(model, ClipText):
        return TextContext(model, part, (0,) * model.text_length)
    if not isinstance(model, Clip | ClipText):
        name = config.frozen[part].name
        raise UserError(f"config.{found[0]} is a {name!r}; what reads captions frozen is a clip_text or a clip")
    # The empty caption between its ends; the start token is the one before the end token.
    ends = (model.text_end_id - 1, model.text_end_id)
    pad = getattr(model, "text_pad_id", 0)
    return TextContext(model, part, ends + (pad,) * (model.text_length - 2), frozen=not trained)


def weigh(
    tokens: Float[Array, "b l d"], weights: Float[Array, "b l"], seen: KeyLengths | None = None
) -> Float[Array, "b l d"]:
    """Features times the weights of their tokens, scaled so that each caption's mean is what it was.

    Where features of both signs cancel, so that the scale is none that weights from 1 / `MOST` to `MOST` lead to among
    features of one sign, nothing is scaled: it would grow without bound, or turn all signs.

    Args:
      tokens: the features.
      weights: of each token.
      seen: how many of each caption's tokens its mean is of; None for all.
    """
    weighed = tokens * weights[..., None]
    where = None if seen is None else seen.dense(tokens.shape[1])[:, 0, 0, :, None]
    before, after = (jnp.mean(each, axis=(1, 2), keepdims=True, where=where) for each in (tokens, weighed))
    scale = before / after
    return (weighed * jnp.where((scale >= 1 / MOST) & (scale <= MOST), scale, 1)).astype(tokens.dtype)
