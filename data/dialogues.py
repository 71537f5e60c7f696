"""Questions and answers as ids: one row of text, of which the answer is what is learned.

A row is start, question, end, answer, end, pads: what a tokenizer with both ends makes of the question, and then of the
answer without another start.
"""

from collections.abc import Sequence

import numpy as np

from cli.errors import UserError
from data.scenes.questions import Dialogue, ask
from data.scenes.scene import find_world
from data.tokenizer import PAD_ID, Encoded, Tokenizer

SOURCES = ("scenes",)


def check_dialogues(source: str, dataset: str, tokenizer: Tokenizer | None) -> None:
    """Raises UserError unless questions of this kind can be asked about a dataset."""
    if source not in SOURCES:
        raise UserError(
            f"config.data.dialogues={source!r} is unknown; choose one of {', '.join(SOURCES)}, or '' for none"
        )
    if find_world(dataset) is None:
        raise UserError(f"config.data.dialogues={source!r} asks about datasets scenes/..., not {dataset}")
    if tokenizer is None or tokenizer.end_id is None:
        raise UserError("config.data.dialogues needs texts with ends; set config.data.text_ends=True and text_length")


def make_dialogue(dataset: str, captions: Sequence[str], rng: np.random.Generator) -> Dialogue:
    """A question about a picture of a dataset, and its answer."""
    world = find_world(dataset)
    assert world is not None  # `check_dialogues` has looked
    return ask(world, captions, rng)


def encode_dialogue(tokenizer: Tokenizer, dialogue: Dialogue, length: int) -> Encoded:
    """One row of exactly `length` ids; of a text that is longer the end of the answer is cut off.

    Args:
      tokenizer: frames texts by a start and an end.
      dialogue: what is said.
      length: of the row.
    """
    question = tokenizer.encode(dialogue.question, tokenizer.count(dialogue.question)).ids
    answer = tokenizer.encode(dialogue.answer, tokenizer.count(dialogue.answer)).ids[1:]
    ids = np.concatenate([question, answer])
    row = np.full(length, PAD_ID, np.int32)
    row[: min(len(ids), length)] = ids[:length]
    return Encoded(row, len(ids) > length)
