"""Are questions about pictures answered right, of each kind, and with a wrong picture? On the embedded dataset.

An answer is right where it is the words that were asked for; a description where it can be read and all that it names
is to be seen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data import scenes
from data.scenes.captions import CaptionQuery
from data.scenes.questions import DESCRIBE, Dialogue, all_questions
from evaluation.caption_accuracy import captioned_pictures, world_of
from evaluation.records import Record
from sample.trained import TrainedSampler

ANSWERS = "answers"
_DESCRIBE = "describe"


def answer_values(trained: TrainedSampler, split: str, num: int, seed: int, settings: Mapping[str, Any]) -> Record:
    """The share of questions that are answered right, of each kind, about the first pictures of a split.

    Args:
      trained: reads a question and a picture, and makes text.
      split: of its dataset.
      num: pictures; each is asked one question of every kind.
      seed: of sampling.
      settings: of sampling.

    Returns:
      values: {kind, and "wrong_picture_" + kind where each question is asked about the next picture}; counted.

    Raises:
      UserError: for another dataset than the embedded one, or a split with fewer pictures.
    """
    world = world_of(trained.config)
    pictures = captioned_pictures(trained.config, split, num)
    truths = [scenes.parse_caption(world, caption) for caption in pictures.captions]
    asked = []
    for index, (truth, caption) in enumerate(zip(truths, pictures.captions, strict=True)):
        questions = all_questions(world, truth, np.random.default_rng((0, index)))
        asked.append({**questions, _DESCRIBE: Dialogue(DESCRIBE, caption)})
    values, counted = {}, {}
    shown = trained.picture_rows(list(pictures.images))
    wrong = {name: np.roll(value, -1, axis=0) for name, value in shown.items()}
    for prefix, images in (("", shown), ("wrong_picture_", wrong)):
        for kind in asked[0]:
            dialogues = [questions[kind] for questions in asked]
            rows = {**trained.encode([dialogue.question for dialogue in dialogues]), **images}
            outputs = trained(rows, seed=seed, indices=range(num), **settings)
            right = _count_right(world, kind, trained.decode(outputs["text"]), dialogues, truths)
            name = prefix + kind.replace(" ", "_")
            values[name], counted[name] = right / num, num
    return {"values": values, "counted": counted}


def _count_right(
    world: scenes.World,
    kind: str,
    answers: Sequence[str],
    dialogues: Sequence[Dialogue],
    truths: Sequence[CaptionQuery],
) -> int:
    if kind == _DESCRIBE:
        return sum(describes(world, answer, truth) for answer, truth in zip(answers, truths, strict=True))
    return sum(answer == dialogue.answer for answer, dialogue in zip(answers, dialogues, strict=True))


def describes(world: scenes.World, text: str, truth: CaptionQuery) -> bool:
    """Whether a text can be read as a caption and names nothing that a scene does not have.

    Args:
      world: of the scene.
      text: what was said.
      truth: the scene, everything named.
    """
    try:
        said = scenes.parse_caption(world, text)
    except ValueError:
        return False
    if said.background not in (None, truth.background) or len(said.objects) != len(truth.objects):
        return False
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    orders = [(truth.objects, truth.relation), (truth.objects[::-1], turned[truth.relation])]
    return any(
        said.relation in (None, relation)
        and all(
            getattr(one, name) in (None, getattr(other, name))
            for one, other in zip(said.objects, objects, strict=True)
            for name in ("shape", "color", "size")
        )
        for objects, relation in orders
    )
