"""Questions and answers as ids: one row of text, of which the answer is what is learned.

A row is a question as the tokenizer frames it, the answer, the tokenizer's end, and pads. With both ends that is start,
question, end, answer, end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from cli.errors import UserError
from data.preprocess import choose_caption
from data.scenes.questions import Dialogue, ask
from data.scenes.scene import find_world
from data.tokenizer import Tokenizer

SCENES, CAPTIONS, TABS = "scenes", "captions", "tabs"
SOURCES = (SCENES, CAPTIONS, TABS)


class EncodedDialogue(NamedTuple):
    """A question with its answer as ids.

    Attributes:
      ids: [l] int32, padded.
      answer: [l] which of them are the answer's, its end included.
      truncated: whether it was longer than l and the answer lost its end.
    """

    ids: Int[np.ndarray, " l"]
    answer: Bool[np.ndarray, " l"]
    truncated: bool


def check_dialogues(source: str, dataset: str, tokenizer: Tokenizer | None) -> None:
    """Raises UserError unless questions of this kind can be asked about a dataset."""
    if source not in SOURCES:
        raise UserError(
            f"config.data.dialogues={source!r} is unknown; choose one of {', '.join(SOURCES)}, or '' for none"
        )
    if source == SCENES and find_world(dataset) is None:
        raise UserError(f"config.data.dialogues={source!r} asks about datasets scenes/..., not {dataset}")
    if tokenizer is None or tokenizer.end_id is None:
        raise UserError("config.data.dialogues needs texts with ends; set config.data.text_ends=True and text_length")


def make_dialogue(source: str, dataset: str, captions: Sequence[str], rng: np.random.Generator | None) -> Dialogue:
    """A question about a picture of a dataset, and its answer.

    Args:
      source: "scenes" asks what is to be seen; "captions" asks nothing, and a caption is the answer; "tabs": captions
        are questions with their answers, a tab between both (a caption without one is an answer to nothing).
      dataset: its name.
      captions: of the picture.
      rng: chooses; None for the first caption.
    """
    if source == SCENES:
        world = find_world(dataset)
        assert world is not None  # `check_dialogues` has looked
        return ask(world, captions, np.random.default_rng(0) if rng is None else rng)
    text = captions[choose_caption(captions, rng)]
    question, tab, answer = text.partition("\t")
    return Dialogue(question.strip(), answer.strip()) if source == TABS and tab else Dialogue("", text)


def encode_dialogue(tokenizer: Tokenizer, dialogue: Dialogue, length: int) -> EncodedDialogue:
    """One row of exactly `length` ids; of a text that is longer the end of the answer is cut off.

    Args:
      tokenizer: frames texts, or at least ends them.
      dialogue: what is said.
      length: of the row.
    """
    question = tokenizer.encode(dialogue.question, tokenizer.count(dialogue.question)).ids
    answer = [*tokenizer.pieces(dialogue.answer), tokenizer.end_id]
    ids = np.concatenate([question, np.array(answer, np.int32)])
    row = np.full(length, tokenizer.pad_id, np.int32)
    row[: min(len(ids), length)] = ids[:length]
    places = np.arange(length)
    return EncodedDialogue(row, (places >= len(question)) & (places < len(ids)), len(ids) > length)
