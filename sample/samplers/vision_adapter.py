"""A picture and a question -> an answer (Dubey et al. 2024, section 7). The picture is read once.

The picture's token stands before the question, or where the tokenizer puts it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from models.layers.tile_positions import canvases
from models.vision_adapter import Sight, VisionAdapter
from sample.decoding import Progress, decode, first_token, next_token
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network
from sample.samplers.llama import AnswerSettings, check_prompts, decoding, end_of_texts, prompt_lengths, tokens_of

Tree = Any
Request = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class VisionAdapterSampler:
    """Answers questions about pictures.

    Attributes:
      model: the network; its parameters are `params["vision_adapter"]`.
      answers: how answers are made.
      end_id: of the tokenizer: behind an answer.
      image_size: side of pictures, pixels: of one tile, or of a square of tiles.
    """

    model: VisionAdapter
    answers: AnswerSettings
    end_id: int
    image_size: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "VisionAdapterSampler":
        """Builds the sampler of `config.models.vision_adapter`, `config.data.image_size` and `config.sample`.

        Raises:
          UserError: if a setting is impossible, it is not known where texts end, or pictures are no square of tiles.
        """
        model, size = build_network(config, "models.vision_adapter"), config.data.image_size
        side = size // model.tile_size
        if size % model.tile_size or not 1 <= side**2 <= model.max_tiles:
            most = math.isqrt(model.max_tiles)
            raise UserError(
                f"config.data.image_size={size} is no square of tiles of {model.tile_size} pixels; the network takes "
                f"{' or '.join(str(model.tile_size * count) for count in range(1, most + 1))}"
            )
        return cls(model, AnswerSettings.from_config(config), end_of_texts(model, "vision_adapter"), size)

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows of a request."""
        return ("text", "image")

    @property
    def sees_several(self) -> bool:
        """Whether a question may be about several pictures."""
        return True

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs hold."""
        return ("text",)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `config.sample`, with their values."""
        return dataclasses.asdict(self.answers)

    def request(
        self, text: Int[np.ndarray, "b t"], image: UInt8[np.ndarray, "b *i H W 3"], **overrides: Any
    ) -> Request:
        """A request for one answer a question.

        Args:
          text: ids of questions, framed, pads behind.
          image: what each is about: a picture, or [I H W 3], several in a row.
          **overrides: of `settings`.

        Raises:
          UserError: on an unknown override, an impossible value, what is no question, or a picture of another size.
        """
        settings = self.answers.changed(overrides)
        text = check_prompts(text, self.model.text_vocab_size + self.model.extra_tokens)
        expected = (len(text), self.image_size, self.image_size, 3)
        if image.ndim not in (4, 5) or (len(image), *image.shape[-3:]) != expected:
            raise UserError(f"pictures are {list(expected)}, not {list(image.shape)}")
        return {"text": text, "image": image, "answer_length": int(settings.answer_length), **settings.numbers}

    def __call__(
        self, params: Tree, variables: Tree, frozen: Tree, request: Request, keys: Key[Array, "b"]
    ) -> dict[str, Array]:
        """Answers each question; answer i depends on its question, picture and key alone.

        Returns:
          {"text": int32 [b answer_length]}, pads behind the end.
        """
        del variables, frozen
        told = {name: value for name, value in request.items() if name != "answer_length"}
        return _answer(self, request["answer_length"], params["vision_adapter"], told, keys)

    def stream(
        self, params: Tree, variables: Tree, frozen: Tree, request: Request, keys: Key[Array, "b"]
    ) -> Iterator[Int[Array, "b"]]:
        """As a call, a token of each answer at a time."""
        del variables, frozen
        told = {name: value for name, value in request.items() if name != "answer_length"}
        params, length = params["vision_adapter"], request["answer_length"]
        progress, sight = _begin(self, length, params, told, keys)
        numbers = {name: value for name, value in told.items() if name not in self.reads}
        return tokens_of(progress, length, lambda state: _go_on(self.model, params, numbers, keys, sight, state))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(
    sampler: VisionAdapterSampler, length: int, params: Tree, request: Request, keys: Array
) -> dict[str, Array]:
    model = sampler.model
    logits, cache, sight = _read(sampler, length, params, request)

    def step(token: Array, position: Array, cache: Any) -> tuple[Array, Any]:
        return model.apply({"params": params}, token, position, cache, sight, method="decode_step")

    return {"text": decode(step, logits, cache, keys, length, decoding(request, model)).tokens}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
    sampler: VisionAdapterSampler, length: int, params: Tree, request: Request, keys: Array
) -> tuple[Progress, Sight]:
    logits, cache, sight = _read(sampler, length, params, request)
    return first_token(logits, cache, keys, decoding(request, sampler.model)), sight


@functools.partial(jax.jit, static_argnums=0, donate_argnames="progress")
def _go_on(
    model: VisionAdapter, params: Tree, numbers: Request, keys: Array, sight: Sight, progress: Progress
) -> Progress:
    def step(token: Array, position: Array, cache: Any) -> tuple[Array, Any]:
        return model.apply({"params": params}, token, position, cache, sight, method="decode_step")

    return next_token(step, progress, keys, decoding(numbers, model))


def _read(sampler: VisionAdapterSampler, length: int, params: Tree, request: Request) -> tuple[Array, Any, Sight]:
    """Reads questions and pictures; see `VisionAdapter.prefill`."""
    model, image = sampler.model, request["image"]
    pictures = image.shape[1] if image.ndim == 5 else 1
    text = with_pictures(request["text"], model.image_token, model.text_pad_id, pictures)
    tiles, canvas = cut_pictures(from_uint8(image), model.tile_size, model.max_tiles)
    lengths = prompt_lengths(text, model.text_pad_id)
    return model.apply({"params": params}, text, length, lengths, tiles, canvas, method="prefill")


def picture_place(text: Int[Array, "b t"], image_token: int) -> Int[Array, "b"]:
    """Where the picture's token stands in each row; -1 in rows without, before which it is put."""
    return jnp.where(jnp.any(text == image_token, axis=1), jnp.argmax(text == image_token, axis=1), -1)


def with_pictures(text: Int[Array, "b t"], image_token: int, pad_id: int = 0, pictures: int = 1) -> Int[Array, "b t2"]:
    """Rows with as many tokens of pictures in a row: where they have one, or else before them.

    Args:
      text: ids, pads behind.
      image_token: stands for a picture.
      pad_id: fills rows up.
      pictures: of each row, n; T2 is T + n.
    """
    return spread_rows(text, picture_place(text, image_token), pictures, image_token, pad_id)


def spread_rows(
    values: Shaped[Array, "b t"], place: Int[Array, "b"], pictures: int, of_picture: int, behind: int
) -> Shaped[Array, "b t2"]:
    """Makes room for n pictures in rows of what belongs to tokens.

    Args:
      values: of each token.
      place: of the token of a picture that rows have already; -1 of those that have none.
      pictures: n; T2 is T + n.
      of_picture: the value of a picture.
      behind: of what a row lacks.
    """
    index, length = jnp.arange(values.shape[1] + pictures), values.shape[1]
    first = jnp.maximum(place, 0)[:, None]
    source = jnp.where(index < first, index, index - jnp.where(place >= 0, pictures - 1, pictures)[:, None])
    spread = jnp.take_along_axis(values, jnp.clip(source, 0, length - 1), axis=1)
    spread = jnp.where(source < length, spread, jnp.asarray(behind, values.dtype))
    is_picture = (index >= first) & (index < first + pictures)
    return jnp.where(is_picture, jnp.asarray(of_picture, values.dtype), spread)


def cut_pictures(
    image: Float[Array, "b *i H W 3"], side: int, max_tiles: int
) -> tuple[Float[Array, "b i t h w 3"], Int[Array, "b i"]]:
    """Square pictures, one or several of a row, as `cut_square`."""
    tiles, canvas = cut_square(image.reshape(-1, *image.shape[-3:]), side, max_tiles)
    return tiles.reshape(len(image), -1, *tiles.shape[2:]), canvas.reshape(len(image), -1)


def cut_square(
    image: Float[Array, "b H W 3"], side: int, max_tiles: int
) -> tuple[Float[Array, "b 1 t h w 3"], Int[Array, "b 1"]]:
    """Square pictures as the tiles of a square canvas, and the number of that canvas.

    Args:
      image: of a whole number of tiles.
      side: of a tile.
      max_tiles: tiles that the network takes; those behind the canvas's are zeros.
    """
    batch, count = len(image), image.shape[1] // side
    tiles = image.reshape(batch, count, side, count, side, 3).swapaxes(2, 3).reshape(batch, 1, -1, side, side, 3)
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, max_tiles - count**2), (0, 0), (0, 0), (0, 0)))
    number = canvases(max_tiles).index((count, count)) + 1
    return tiles, jnp.full((batch, 1), number, jnp.int32)
