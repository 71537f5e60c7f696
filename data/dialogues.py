"""Questions and answers as ids: one row of text, of which the answer is what is learned.

A row is a question as the tokenizer frames it, the answer, the tokenizer's end, and pads. With both ends that is start,
question, end, answer, end.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from cli.errors import UserError
from data.preprocess import choose_caption
from data.scenes.captions import parse_caption, write_captions
from data.scenes.questions import Dialogue, ask, ask_whether
from data.scenes.scene import find_world, sample_scene
from data.tokenizer import Tokenizer

SCENES, IN_WORDS, CAPTIONS, TABS = "scenes", "scenes_in_words", "captions", "tabs"
SOURCES = (SCENES, IN_WORDS, CAPTIONS, TABS)
ABOUT_SCENES = (SCENES, IN_WORDS)
_TOLD = 0.75  # share of questions "in words" that stand behind a caption
_WHETHER = 0.75  # share of these that are for yes or no: comparing takes longer to learn than the rest


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
    if source in ABOUT_SCENES and find_world(dataset) is None:
        raise UserError(f"config.data.dialogues={source!r} asks about datasets scenes/..., not {dataset}")
    if tokenizer is None or tokenizer.end_id is None:
        raise UserError("config.data.dialogues needs texts with ends; set config.data.text_ends=True and text_length")


def make_dialogue(source: str, dataset: str, captions: Sequence[str], rng: np.random.Generator | None) -> Dialogue:
    """A question about a picture of a dataset, and its answer.

    Args:
      source: "scenes" asks what is to be seen; "scenes_in_words" asks the same, mostly behind a caption that says all
        there is, for what has no picture; "captions" asks nothing, and a caption is the answer; "tabs": captions
        are questions with their answers, a tab between both (a caption without one is an answer to nothing).
      dataset: its name.
      captions: of the picture.
      rng: chooses; None for the first caption.
    """
    if source in ABOUT_SCENES:
        world = find_world(dataset)
        assert world is not None  # `check_dialogues` has looked
        rng = np.random.default_rng(0) if rng is None else rng
        if source == IN_WORDS:  # of all pairs of shape and color alike: nothing is shown
            world = dataclasses.replace(world, held_out=frozenset())
            captions = write_captions(world, sample_scene(world, rng))
        told = source == IN_WORDS and rng.random() < _TOLD
        if told and rng.random() < _WHETHER:
            dialogue = ask_whether(world, parse_caption(world, captions[0]), rng)
        else:
            dialogue = ask(world, captions, rng)
        if not told:
            return dialogue
        caption = captions[int(rng.integers(len(captions)))]
        caption = caption if parse_caption(world, caption).complete else captions[0]
        return Dialogue(f"{caption}. {dialogue.question}", dialogue.answer)
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
