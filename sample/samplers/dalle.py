"""Captions -> images with a trained DALL-E: one compiled loop with a key/value cache.

Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.3, without the CLIP reranking. Guidance, top-k and
top-p are later additions, of which `sample.decoding` tells. The top of a picture may be given: its rows of tokens are
kept, and the stream, which is in raster order, goes on from there.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from models.dalle import Dalle
from sample.decoding import Decoding, Given, check_numbers, decode, is_guided
from sample.image_tokens import ImageTokens
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network, read_settings

Tree = Any
Request = dict[str, Any]

_SETTINGS = ("guidance", "temperature", "top_k", "top_p")


@dataclasses.dataclass(frozen=True)
class DalleSampler:
    """Draws pictures for captions.

    Attributes:
      model: the transformer; its parameters are `params["dalle"]`.
      image_tokens: the image tokenizer, which draws; its weights are `frozen["dvae"]`.
      guidance: default w of uncond + w (cond - uncond) on the logits, w = 1 meaning none. The unconditional caption
        is blank: all pads.
      temperature: default divisor of the logits; 0 takes the most likely token.
      top_k: default number of most likely tokens to keep (ties are kept), 0 for all.
      top_p: default probability that the kept tokens reach together, 1 for all.
    """

    model: Dalle
    image_tokens: ImageTokens
    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def from_config(cls, config: ConfigDict) -> "DalleSampler":
        """Builds the sampler of `config.models.dalle`, `config.frozen.dvae` and the defaults in `config.sample`.

        Raises:
          UserError: if a default is impossible, or the image tokenizer does not fit the transformer.
        """
        given = read_settings(config.sample, cls)
        model = build_network(config, "models.dalle")
        image_tokens = ImageTokens.from_config(config)
        check_image_tokens(model, image_tokens)
        sampler = cls(model, image_tokens, **given)
        check_numbers(sampler.settings)
        return sampler

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows that a request holds."""
        return ("text",)

    @property
    def may_read(self) -> dict[str, dict[str, Any]]:
        """A picture whose first rows of tokens are kept: half of them unless told otherwise."""
        return {"image": {"keep_rows": self.model.image_grid[0] // 2}}

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs hold."""
        return ("image",)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `config.sample`, with their values."""
        return {key: getattr(self, key) for key in _SETTINGS}

    def request(
        self, text: Int[np.ndarray, "b t"], image: UInt8[np.ndarray, "b H W c"] | None = None, **overrides: Any
    ) -> Request:
        """A request for one picture per caption.

        Args:
          text: caption ids, 0 where there is no token.
          image: pictures to complete; None draws whole ones.
          **overrides: guidance, temperature, top_k, top_p; keep_rows, how many rows of tokens of `image` are kept; or
            image_prefix: int [b n], the first n image tokens of each picture in raster order, which the sampler
            continues.

        Returns:
          What `__call__` takes as `request`: numpy values; none of them but the shapes leads to a new compilation.

        Raises:
          UserError: on an unknown override or an impossible value.
        """
        text = np.asarray(text)
        numbers = self.settings
        known = (*numbers, "keep_rows", "image_prefix")
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise UserError(f"{', '.join(unknown)}: no such sampling option; choose from {', '.join(known)}")
        numbers.update({key: value for key, value in overrides.items() if key in numbers})
        check_numbers(numbers)
        if text.ndim != 2 or text.shape[1] != self.model.text_length:
            raise UserError(f"captions are [batch, {self.model.text_length}] token ids, not {list(text.shape)}")
        _check_ids("caption", text, self.model.text_vocab_size)
        return {
            "text": text.astype(np.int32),
            "guidance": np.float32(numbers["guidance"]),
            "temperature": np.float32(numbers["temperature"]),
            "top_k": np.int32(numbers["top_k"]),
            "top_p": np.float32(numbers["top_p"]),
            **self._given(len(text), image, overrides),
        }

    def __call__(
        self, params: Tree, variables: Tree, frozen: Tree, request: Request, keys: Key[Array, "b"]
    ) -> dict[str, Array]:
        """Draws one picture per caption; picture i depends on its caption and key alone.

        There are two compiled programs for a batch size: without guidance, and with it at twice the work. Inside
        another jit, where the value of the guidance is not known, it is always the second. Pictures to complete make
        two more.

        Args:
          params: {"dalle": tree}.
          variables: unused.
          frozen: {"dvae": {"params": tree, "variables": collections}}.
          request: from `request`.
          keys: one key per picture.

        Returns:
          {"image": float [b H W c] in [-1, 1], "image_tokens": int32 [b h w]}.
        """
        del variables
        guided = is_guided(request["guidance"])
        return _draw(self.model, self.image_tokens, guided, params["dalle"], frozen, request, keys)

    def _given(self, batch: int, image: np.ndarray | None, overrides: Mapping[str, Any]) -> Request:
        """What a request knows of the pictures: pixels, whose tokens the program takes, or tokens; and how many.

        Raises:
          UserError: if that does not fit the network, or a setting has nothing that it is of.
        """
        height, width = self.model.image_grid
        prefix = np.asarray(overrides.get("image_prefix", np.zeros((batch, 0), np.int32)))
        if image is None:
            if "keep_rows" in overrides:
                raise UserError(
                    f"keep_rows={overrides['keep_rows']} is of a picture that is given, and there is none; give "
                    "--image=FILE, or leave it out"
                )
        else:
            if "image_prefix" in overrides:
                raise UserError("a picture and image_prefix both say how a picture begins; leave one of them out")
            rows = overrides.get("keep_rows", self.may_read["image"]["keep_rows"])
            if rows != int(rows) or not 0 <= rows < height:
                raise UserError(
                    f"keep_rows={rows} is impossible; a picture has {height} rows of tokens: keep 0 to {height - 1}"
                )
            expected = (batch, *self.image_tokens.picture_shape)
            if image.shape != expected:
                raise UserError(f"pictures are {list(expected)}, not {list(image.shape)}")
            if rows:  # none of it is the same as no picture, and the same program
                return {"image": image, "prefix_length": np.int32(rows * width)}
        tokens, length = np.zeros((batch, height * width), np.int32), prefix.shape[-1]
        if prefix.ndim != 2 or len(prefix) != batch or length > tokens.shape[1]:
            raise UserError(
                f"image_prefix is [{batch}, at most {tokens.shape[1]}] image tokens, not {list(prefix.shape)}"
            )
        _check_ids("image_prefix", prefix, self.model.image_vocab_size)
        tokens[:, :length] = prefix
        return {"image_prefix": tokens, "prefix_length": np.int32(length)}


def check_image_tokens(model: Dalle, image_tokens: ImageTokens) -> None:
    """Raises UserError unless the transformer's image grid and vocabulary are the tokenizer's."""
    grid, expected = tuple(model.image_grid), image_tokens.grid
    if grid != expected:
        raise UserError(
            f"config.models.dalle.image_grid is {grid}, but config.frozen.dvae makes {expected} tokens; set it to that"
        )
    if model.image_vocab_size != image_tokens.vocab_size:
        raise UserError(
            f"config.models.dalle.image_vocab_size is {model.image_vocab_size}, but config.frozen.dvae has "
            f"{image_tokens.vocab_size} codes; set it to that"
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(
    model: Dalle, image_tokens: ImageTokens, guided: bool, params: Tree, frozen: Tree, request: Request, keys: Array
) -> dict[str, Array]:
    """The compiled program of `DalleSampler.__call__`: caption in parallel, then one image token a step."""
    text = request["text"]
    batch = text.shape[0]
    if guided:
        text = jnp.stack([text, jnp.zeros_like(text)], axis=1).reshape(2 * batch, -1)
    logits, cache = model.apply({"params": params}, text, method="prefill")
    numbers = {key: request[key] for key in _SETTINGS}
    if "image" in request:
        given = image_tokens.encode(frozen, from_uint8(request["image"])).reshape(batch, -1)
    else:
        given = request["image_prefix"]
    tokens = decode(
        lambda token, position, cache: model.apply({"params": params}, token, position, cache, method="decode_step"),
        logits,
        cache,
        keys,
        model.image_length,
        Decoding(**numbers, guided=guided),
        Given(given, request["prefix_length"]),
    ).tokens.reshape(batch, *model.image_grid)
    return {"image": image_tokens.decode(frozen, tokens), "image_tokens": tokens}


def _check_ids(what: str, ids: np.ndarray, vocab_size: int) -> None:
    """Raises UserError unless every id is in the vocabulary."""
    if ids.size and not (np.issubdtype(ids.dtype, np.integer) and ids.min() >= 0 and ids.max() < vocab_size):
        raise UserError(f"{what} has ids from {ids.min()} to {ids.max()}; the vocabulary is 0 to {vocab_size - 1}")
