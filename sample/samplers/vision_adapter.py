"""A picture and a question -> an answer (Dubey et al. 2024, section 7). The picture is read once.

The picture's token stands before the question, or where the tokenizer puts it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from models.layers.tile_positions import canvases
from models.picture_reader import PictureReader
from models.vision_adapter import Sight
from sample.decoding import Progress, decode, first_token, next_token
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network
from sample.samplers.llama import AnswerSettings, check_prompts, decoding, end_of_texts, prompt_lengths, tokens_of

Tree = Any
Request = dict[str, Any]

PICTURE = ("image", "canvas")  # what batches and requests hold of pictures; of one tile without a canvas


@dataclasses.dataclass(frozen=True)
class VisionAdapterSampler:
    """Answers questions about pictures.

    Attributes:
      model: the network; its parameters are `params["vision_adapter"]`.
      answers: how answers are made.
      end_id: of the tokenizer: behind an answer.
    """

    model: PictureReader
    answers: AnswerSettings
    end_id: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "VisionAdapterSampler":
        """Builds the sampler of `config.models.vision_adapter`, `config.sample`, and the pictures of `config.data`.

        Raises:
          UserError: if a setting is impossible, it is not known where texts end, or pictures are cut otherwise than
            the network takes them.
        """
        model = build_network(config, "models.vision_adapter")
        for key, field in {"image_size": "tile_size", "max_tiles": "max_tiles"}.items():
            given, wanted = config.data.get(key, 1), getattr(model, field)
            if given != wanted:
                raise UserError(
                    f"config.data.{key} is {given}, but config.models.vision_adapter.{field} is {wanted}; they must be "
                    "equal"
                )
        return cls(model, AnswerSettings.from_config(config), end_of_texts(model, "vision_adapter"))

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
        self,
        text: Int[np.ndarray, "b t"],
        image: UInt8[np.ndarray, "b *i H W 3"],
        canvas: Int[np.ndarray, "b *n"] | None = None,
        **overrides: Any,
    ) -> Request:
        """A request for one answer a question.

        Args:
          text: ids of questions, framed, pads behind.
          image: what each is about: a picture, or [I H W 3], several in a row. Of a network of several tiles each is
            [T H W 3], as `data.tiles` cuts it.
          canvas: of each picture, the number of its canvas; None where there is one tile.
          **overrides: of `settings`.

        Raises:
          UserError: on an unknown override, an impossible value, what is no question, or a picture of another size.
        """
        settings = self.answers.changed(overrides)
        text = check_prompts(text, self.model.text_vocab_size + self.model.extra_tokens)
        model = self.model
        one = (model.tile_size, model.tile_size, 3)
        one = (model.max_tiles, *one) if model.max_tiles > 1 else one
        several = image.ndim - len(one) - 1
        if several not in (0, 1) or (len(image), *image.shape[-len(one) :]) != (len(text), *one):
            raise UserError(f"pictures are {[len(text), *one]}, not {list(image.shape)}")
        rows = {"text": text, "image": image}
        if model.max_tiles > 1:
            numbers = range(len(canvases(model.max_tiles)) + 1)
            if canvas is None or canvas.shape != image.shape[: 1 + several] or not np.isin(canvas, numbers).all():
                raise UserError(f"pictures in tiles have a canvas each, of number {numbers[0]} to {numbers[-1]}")
            rows["canvas"] = canvas
        return {**rows, "answer_length": int(settings.answer_length), **settings.numbers}

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
        numbers = {name: value for name, value in told.items() if name not in ("text", *PICTURE)}
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
) -> tuple[Progress, Sight | None]:
    logits, cache, sight = _read(sampler, length, params, request)
    return first_token(logits, cache, keys, decoding(request, sampler.model)), sight


@functools.partial(jax.jit, static_argnums=0, donate_argnames="progress")
def _go_on(
    model: PictureReader, params: Tree, numbers: Request, keys: Array, sight: Sight | None, progress: Progress
) -> Progress:
    def step(token: Array, position: Array, cache: Any) -> tuple[Array, Any]:
        return model.apply({"params": params}, token, position, cache, sight, method="decode_step")

    return next_token(step, progress, keys, decoding(numbers, model))


def _read(
    sampler: VisionAdapterSampler, length: int, params: Tree, request: Request
) -> tuple[Array, Any, Sight | None]:
    """Reads questions and pictures; see `models.vision_adapter.VisionAdapter.prefill`."""
    model = sampler.model
    tiles, canvas = tiles_of(request)
    pictures = canvas.shape[1] * model.picture_tokens
    text = with_pictures(request["text"], model.image_token, model.text_pad_id, pictures)
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


def answers_behind_pictures(
    text: Int[Array, "b t"], answer: Bool[Array, "b t"], model: PictureReader
) -> tuple[Int[Array, "b t2"], Bool[Array, "b t2"]]:
    """`with_pictures` of one picture a row, and which tokens are the answer's there."""
    tokens = model.picture_tokens
    answer = spread_rows(answer, picture_place(text, model.image_token), tokens, False, False)
    return with_pictures(text, model.image_token, model.text_pad_id, tokens), answer


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


def tiles_of(rows: Mapping[str, Any]) -> tuple[Float[Array, "b i t h w 3"], Int[Array, "b i"]]:
    """The pictures of each text as the network reads them, and their canvases.

    Args:
      rows: `PICTURE` of a batch or a request: uint8 [b *i h w 3], each one tile; or, with their canvases int32 [b *i],
        [b *i t h w 3].
    """
    image, canvas = jnp.asarray(rows["image"]), rows.get("canvas")
    if canvas is None:
        image = image[..., None, :, :, :]
        canvas = jnp.ones(image.shape[:-4], jnp.int32)
    tiles = from_uint8(image).reshape(len(image), -1, *image.shape[-4:])
    return tiles, jnp.asarray(canvas).reshape(len(image), -1)
