"""A question -> an answer, by a language model alone: text goes on after the end of the prompt.

Also what the vision adapter's sampler shares with it: where a prompt ends, and the settings of how tokens are chosen.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from models.llama import Llama
from sample.decoding import Decoding, Progress, check_numbers, decode, first_token, next_token
from sample.samplers.from_config import build_network, read_settings

Tree = Any
Request = dict[str, Any]

_NUMBERS = ("temperature", "top_k", "top_p")


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """How an answer is made.

    Attributes:
      temperature: divisor of the logits; 0 takes the most likely token.
      top_k: number of most likely tokens to keep, 0 for all.
      top_p: probability that the kept tokens reach together, 1 for all.
      answer_length: tokens of an answer at most.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    answer_length: int = 32

    @classmethod
    def from_config(cls, config: ConfigDict) -> "AnswerSettings":
        """Reads `config.sample`.

        Raises:
          UserError: if a setting is impossible.
        """
        settings = cls(**read_settings(config.sample, cls))
        settings.changed({})
        return settings

    def changed(self, overrides: dict[str, Any]) -> "AnswerSettings":
        """With others.

        Raises:
          UserError: on an unknown or impossible one.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(overrides) - set(known)):
            raise UserError(f"{', '.join(unknown)}: no such sampling option; choose from {', '.join(known)}")
        settings = dataclasses.replace(self, **overrides)
        check_numbers({"guidance": 1.0, **{name: getattr(settings, name) for name in _NUMBERS}})
        if not 1 <= settings.answer_length <= 4096 or settings.answer_length != int(settings.answer_length):
            raise UserError(f"answer_length={settings.answer_length} is impossible; use 1 to 4096 tokens")
        return settings

    @property
    def numbers(self) -> dict[str, np.generic]:
        """What a program is given; none of it leads to another one."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
        }


@dataclasses.dataclass(frozen=True)
class LlamaSampler:
    """Answers questions.

    Attributes:
      model: the network; its parameters are `params["llama"]`.
      answers: how answers are made.
      end_id: of the tokenizer: behind an answer.
    """

    model: Llama
    answers: AnswerSettings
    end_id: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "LlamaSampler":
        """Builds the sampler of `config.models.llama` and `config.sample`.

        Raises:
          UserError: if a setting is impossible, or it is not known where texts end.
        """
        model = build_network(config, "models.llama")
        return cls(model, AnswerSettings.from_config(config), end_of_texts(model, "llama"))

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows of a request."""
        return ("text",)

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs hold."""
        return ("text",)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `config.sample`, with their values."""
        return dataclasses.asdict(self.answers)

    def request(self, text: Int[np.ndarray, "b t"], **overrides: Any) -> Request:
        """A request for one answer a question.

        Args:
          text: ids of questions, framed, pads behind.
          **overrides: of `settings`.

        Raises:
          UserError: on an unknown override, an impossible value, or what is no question.
        """
        settings = self.answers.changed(overrides)
        text = check_prompts(text, self.model.text_vocab_size)
        return {"text": text, "answer_length": int(settings.answer_length), **settings.numbers}

    def __call__(
        self, params: Tree, variables: Tree, frozen: Tree, request: Request, keys: Key[Array, "b"]
    ) -> dict[str, Array]:
        """Answers each question; answer i depends on its question and key alone.

        Returns:
          {"text": int32 [b answer_length]}, pads behind the end.
        """
        del variables, frozen
        told = {name: value for name, value in request.items() if name != "answer_length"}
        return _answer(self.model, request["answer_length"], params["llama"], told, keys)

    def stream(
        self, params: Tree, variables: Tree, frozen: Tree, request: Request, keys: Key[Array, "b"]
    ) -> Iterator[Int[Array, "b"]]:
        """As a call, a token of each answer at a time."""
        del variables, frozen
        told = {name: value for name, value in request.items() if name != "answer_length"}
        params, length = params["llama"], request["answer_length"]
        progress = _begin(self.model, length, params, told, keys)
        return tokens_of(progress, length, lambda state: _go_on(self.model, params, told, keys, state))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(model: Llama, length: int, params: Tree, request: Request, keys: Array) -> Progress:
    text = request["text"]
    lengths = prompt_lengths(text, model.text_pad_id)
    logits, cache = model.apply({"params": params}, text, length, lengths, method="prefill")
    return first_token(logits, cache, keys, decoding(request, model))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="progress")
def _go_on(model: Llama, params: Tree, request: Request, keys: Array, progress: Progress) -> Progress:
    step = functools.partial(model.apply, {"params": params}, method="decode_step")
    return next_token(step, progress, keys, decoding(request, model))


def tokens_of(progress: Progress, length: int, go_on: Callable[[Progress], Progress]) -> Iterator[Int[Array, "b"]]:
    """The tokens of a loop that is turned from here, until all answers have ended or have `length` tokens."""
    for position in range(length):
        if position:
            progress = go_on(progress)
        running = bool(jnp.any(progress.running))  # the next turn takes the memory of this one
        yield progress.token
        if not running:
            return


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(model: Llama, length: int, params: Tree, request: Request, keys: Array) -> dict[str, Array]:
    text = request["text"]
    lengths = prompt_lengths(text, model.text_pad_id)
    logits, cache = model.apply({"params": params}, text, length, lengths, method="prefill")

    def step(token: Array, position: Array, cache: Any) -> tuple[Array, Any]:
        return model.apply({"params": params}, token, position, cache, method="decode_step")

    return {"text": decode(step, logits, cache, keys, length, decoding(request, model)).tokens}


def end_of_texts(model: Any, part: str) -> int:
    """The id that ends a text.

    Raises:
      UserError: if the network's config does not tell it.
    """
    if model.text_end_id is None or not 0 < model.text_end_id < model.text_vocab_size:
        raise UserError(
            f"config.models.{part}.text_end_id is {model.text_end_id}; set it to the id that ends texts in the run's "
            f"tokenizer, one of {model.text_vocab_size}"
        )
    return model.text_end_id


def decoding(request: Request, model: Any) -> Decoding:
    """How the tokens of a request are chosen, and at which they stop: those of a `Llama` or a `VisionAdapter`."""
    numbers = {name: request[name] for name in _NUMBERS}
    return Decoding(**numbers, stop_tokens=(model.text_end_id, *model.text_stop_ids), pad_token=model.text_pad_id)


def prompt_lengths(text: Int[Array, "b t"], pad_id: int) -> Int[Array, "b"]:
    """Tokens of each prompt, up to the last that is no pad; at least 1."""
    return jnp.max(jnp.where(text != pad_id, jnp.arange(1, text.shape[1] + 1), 1), axis=1).astype(jnp.int32)


def check_prompts(text: Int[np.ndarray, "b t"], vocab_size: int) -> Int[np.ndarray, "b t"]:
    """Raises UserError unless rows are ids of this vocabulary; returns them as int32."""
    text = np.asarray(text)
    if text.ndim != 2 or not text.size or text.min() < 0 or text.max() >= vocab_size:
        raise UserError(f"questions are [batch, tokens] of ids below {vocab_size}, not {list(text.shape)}")
    return text.astype(np.int32)


def check_questions(text: Int[np.ndarray, "b t"], vocab_size: int, end_id: int) -> Int[np.ndarray, "b t"]:
    """Raises UserError unless rows are questions with an end; returns them as int32."""
    text = check_prompts(text, vocab_size)
    without = np.flatnonzero(~np.any(text == end_id, axis=1))
    if len(without):
        raise UserError(f"question {without[0]} of {len(text)} has no end (id {end_id}); make it shorter")
    return text
