"""A picture and a question -> an answer (Dubey et al. 2024, section 7). The picture is read once.

The picture's token stands before the question, whose end is where the answer begins.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from models.layers.tile_positions import canvases
from models.vision_adapter import VisionAdapter
from sample.decoding import decode
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network
from sample.samplers.llama import AnswerSettings, check_questions, decoding, end_of_texts, prompt_lengths

Tree = Any
Request = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class VisionAdapterSampler:
    """Answers questions about pictures.

    Attributes:
      model: the network; its parameters are `params["vision_adapter"]`.
      answers: how answers are made.
      end_id: of the tokenizer: behind a question, and behind an answer.
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
    def makes(self) -> tuple[str, ...]:
        """What outputs hold."""
        return ("text",)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `config.sample`, with their values."""
        return dataclasses.asdict(self.answers)

    def request(self, text: Int[np.ndarray, "b t"], image: UInt8[np.ndarray, "b H W 3"], **overrides: Any) -> Request:
        """A request for one answer a question.

        Args:
          text: ids of questions, framed, 0 behind.
          image: what each is about.
          **overrides: of `settings`.

        Raises:
          UserError: on an unknown override, an impossible value, a question without an end, or a picture of another
            size.
        """
        settings = self.answers.changed(overrides)
        text = check_questions(text, self.model.text_vocab_size, self.end_id)
        expected = (len(text), self.image_size, self.image_size, 3)
        if image.shape != expected:
            raise UserError(f"pictures are {list(expected)}, not {list(image.shape)}")
        return {"text": text, "image": image, "answer_length": int(settings.answer_length), **settings.numbers}

    def __call__(
        self, params: Tree, variables: Tree, frozen: Tree, request: Request, keys: Key[Array, "b"]
    ) -> dict[str, Array]:
        """Answers each question; answer i depends on its question, picture and key alone.

        Returns:
          {"text": int32 [b answer_length]}, 0 behind the end.
        """
        del variables, frozen
        told = {name: value for name, value in request.items() if name != "answer_length"}
        return _answer(self, request["answer_length"], params["vision_adapter"], told, keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(
    sampler: VisionAdapterSampler, length: int, params: Tree, request: Request, keys: Array
) -> dict[str, Array]:
    model, end_id = sampler.model, sampler.end_id
    text = with_picture(request["text"], model.image_token)
    tiles, canvas = cut_square(from_uint8(request["image"]), model.tile_size, model.max_tiles)
    lengths = prompt_lengths(text, end_id)
    logits, cache, sight = model.apply({"params": params}, text, length, lengths, tiles, canvas, method="prefill")

    def step(token: Array, position: Array, cache: Any) -> tuple[Array, Any]:
        return model.apply({"params": params}, token, position, cache, sight, method="decode_step")

    return {"text": decode(step, logits, cache, keys, length, decoding(request, end_id)).tokens}


def with_picture(text: Int[Array, "b t"], image_token: int) -> Int[Array, "b t2"]:
    """Rows with the picture's token before them."""
    return jnp.pad(text, ((0, 0), (1, 0)), constant_values=image_token)


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
