"""Prompts with weights and of any length, as users of Stable Diffusion write them; off unless asked for.

`(words)` and `(words:1.3)` count 1.1 times or as many times as said, `[words]` one 1.1th; brackets inside others
multiply, and a backslash before one makes it a sign. The weights multiply the features of their tokens, which are then
scaled so that their mean over the prompt is what it was (the convention of AUTOMATIC1111's interface). A prompt that is
longer than the network's context is cut into chunks of it, each between ends of its own, whose features follow one
another.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cli.errors import UserError
from data.tokenizer import Tokenizer

STEP = 1.1  # what a bracket without a number multiplies by
MOST = 100.0  # what words count at most, brackets multiplied; at least, its inverse

_TOKEN = re.compile(r"\\[()\[\]\\]|:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)
_CLOSING = {"(": ")", "[": "]"}


class Weighted(NamedTuple):
    """A part of a prompt, and how much it counts."""

    text: str
    weight: float


def parse_weights(prompt: str) -> tuple[Weighted, ...]:
    """Takes the brackets of a prompt apart; neighbors of equal weight are one part.

    Raises:
      UserError: if a bracket is not closed or not opened, or words count more than `MOST` or less than its inverse.
    """
    parts: list[Weighted] = []
    opened: list[tuple[str, int]] = []  # brackets, and the part that each begins with

    def close(kind: str, factor: float) -> None:
        if not opened or _CLOSING[opened[-1][0]] != kind:
            raise UserError(f"the prompt {prompt!r} closes a {kind} that nothing opens; write \\{kind} for the sign")
        _, start = opened.pop()
        parts[start:] = [Weighted(text, weight * factor) for text, weight in parts[start:]]
        for text, weight in parts[start:]:
            if not 1 / MOST <= weight <= MOST:
                bounds = f"a weight must lie between {1 / MOST:g} and {MOST:g}"
                raise UserError(f"the prompt {prompt!r} weighs {text!r} by {weight:g}; {bounds}")

    for token in _TOKEN.findall(prompt):
        if token in _CLOSING:
            opened.append((token, len(parts)))
        elif token == ")":
            close(")", STEP)
        elif token == "]":
            close("]", 1 / STEP)
        elif token.startswith(":") and token.endswith(")"):
            close(")", float(token[1:-1]))
        else:
            text = token[1:] if token.startswith("\\") and len(token) == 2 else token
            parts.append(Weighted(text, 1.0))
    if opened:
        sign = opened[-1][0]
        raise UserError(f"the prompt {prompt!r} opens a {sign} that nothing closes; write \\{sign} for the sign")
    merged: list[Weighted] = []
    for part in parts:
        if merged and np.isclose(merged[-1].weight, part.weight):
            merged[-1] = Weighted(merged[-1].text + part.text, part.weight)
        else:
            merged.append(part)
    return tuple(merged)


def plain(parts: Sequence[Weighted]) -> str:
    """The words of a prompt, without brackets and weights."""
    return "".join(part.text for part in parts)


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Sequence[Weighted]], length: int
) -> tuple[Int[np.ndarray, "n l"], Float[np.ndarray, "n l"], tuple[int, ...]]:
    """Prompts as ids and weights [n, k length], all of as many chunks k as the longest needs; and how many each needs.

    Args:
      tokenizer: one that frames captions.
      prompts: their parts.
      length: of a chunk, both ends included.

    Raises:
      UserError: if the tokenizer frames nothing.
    """
    if tokenizer.start_id is None or tokenizer.end_id is None:
        raise UserError("weights and long prompts are of captions between ends, and this run's have none")
    room = length - 2
    rows = []
    for parts in prompts:
        ids = [(one, part.weight) for part in parts for one in tokenizer.pieces(part.text)]
        rows.append([ids[start : start + room] for start in range(0, max(1, len(ids)), room)])
    needed = tuple(map(len, rows))
    chunks = max(needed)
    texts = np.full((len(rows), chunks, length), tokenizer.pad_id, np.int32)
    weights = np.ones((len(rows), chunks, length), np.float32)
    for row, text, weight in zip(rows, texts, weights, strict=True):
        for place in range(chunks):
            ids = row[place] if place < len(row) else []
            text[place, : len(ids) + 2] = [tokenizer.start_id, *(one for one, _ in ids), tokenizer.end_id]
            weight[place, 1 : len(ids) + 1] = [value for _, value in ids]
    return texts.reshape(len(rows), -1), weights.reshape(len(rows), -1), needed
