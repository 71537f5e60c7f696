"""Questions about scenes with their answers, made of a caption that names everything.

`answer_type` sorts questions again, so that answers can be counted a type.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.scenes.captions import CaptionQuery, ObjectQuery, parse_caption
from data.scenes.scene import World

TYPES = ("shape", "color", "count", "where", "yes or no", "describe")
DESCRIBE = "describe it"
_PARTS = ("shape", "color")


class Dialogue(NamedTuple):
    """A question about a picture and what is to be said.

    Attributes:
      question: lower-case text.
      answer: lower-case text.
    """

    question: str
    answer: str


def ask(world: World, captions: Sequence[str], rng: np.random.Generator) -> Dialogue:
    """Asks something about a scene: each type of question as often as the others, yes as often as no.

    Half the questions for yes or no are about a shape or a color alone. An absent object that is asked about is of a
    pair of shape and color that the training split shows: of any other pair training could only deny, so that the
    question alone would tell the answer. Of each pair that is asked about there the answer is yes as often as no.

    Args:
      world: of the scene.
      captions: of it, as they are stored; the first names everything, and each may be asked for.
      rng: chooses.

    Raises:
      ValueError: if the first caption names less than everything.
    """
    scene = parse_caption(world, captions[0])
    if not scene.complete:
        raise ValueError(f"the caption {captions[0]!r} does not name everything")
    kind = TYPES[int(rng.integers(len(TYPES)))]
    if kind == "describe":
        return Dialogue(DESCRIBE, captions[int(rng.integers(len(captions)))])
    if kind == "yes or no":
        return ask_whether(world, scene, rng)
    return all_questions(world, scene, rng)[kind]


def all_questions(world: World, scene: CaptionQuery, rng: np.random.Generator) -> Mapping[str, Dialogue]:
    """One question of each type but "describe".

    Args:
      world: of the scene.
      scene: what is to be seen, everything named.
      rng: chooses the object that is asked about, and whether it is there.
    """
    objects = scene.objects
    index = int(rng.integers(len(objects)))
    if len(objects) == 3 and index == 1:  # two others lie in one direction from where an end lies
        index = 2 * int(rng.integers(2))
    one = objects[index]
    yes = bool(rng.integers(2))
    asked = one if yes else _another(world, scene, one, rng)
    if len(objects) == 1:
        shape = Dialogue("which shape is it?", one.shape)
        color = Dialogue(f"which color is the {one.shape}?", str(one.color))
        where = Dialogue(f"where is the {one.shape}?", f"on a {scene.background} background")
    else:
        # Both may have the same shape or color, but never both: the place tells them apart.
        other, relation = objects[1 - index if len(objects) == 2 else 1], _seen_from(str(scene.relation), index)
        shape = Dialogue(f"which shape is {relation} the {_name(other)}?", one.shape)
        color = Dialogue(f"which color is the {one.shape} {relation} the {_name(other)}?", str(one.color))
        where = Dialogue(f"where is the {_name(one)}?", f"{relation} the {_name(other)}")
    return {
        "shape": shape,
        "color": color,
        "count": Dialogue("how many shapes are there?", ("one", "two", "three")[len(objects) - 1]),
        "where": where,
        "yes or no": Dialogue(f"is there {_article(_name(asked))}?", "yes" if yes else "no"),
    }


def answer_type(question: str) -> str:
    """Which of `TYPES` a question of this file is; "describe" for any other text."""
    starts = {"which shape": "shape", "which color": "color", "how many": "count", "where": "where"}
    starts["is there"] = "yes or no"
    return next((kind for start, kind in starts.items() if question.startswith(start)), "describe")


def ask_whether(world: World, scene: CaptionQuery, rng: np.random.Generator) -> Dialogue:
    """Whether an object, one of its shape, or anything of its color is there; see `ask`.

    What is absent differs from an object of the scene in the shape or in the color, each as often. Since such neighbors
    are drawn alike both ways, a pair, shape or color is asked about in vain as often as it is there.
    """
    one = scene.objects[int(rng.integers(len(scene.objects)))]
    yes, alone = bool(rng.integers(2)), bool(rng.integers(2))
    absent = {}
    for part in _PARTS:
        there = {getattr(item, part) for item in scene.objects} if alone else set()
        absent[part] = [
            other
            for other in _others(world, scene, one, part)
            if (other.shape, other.color) not in world.held_out and getattr(other, part) not in there
        ]
    parts = [part for part in _PARTS if absent[part]]  # a world may show one shape alone
    part = parts[int(rng.integers(len(parts)))]
    asked = one if yes else absent[part][int(rng.integers(len(absent[part])))]
    if not alone:
        thing = _article(_name(asked))
    else:
        thing = _article(asked.shape) if part == "shape" else f"anything {asked.color}"
    return Dialogue(f"is there {thing}?", "yes" if yes else "no")


def _another(world: World, scene: CaptionQuery, one: ObjectQuery, rng: np.random.Generator) -> ObjectQuery:
    """An object like one of the scene's that is not in it: of another shape or another color."""
    others = _others(world, scene, one, "shape" if rng.integers(2) else "color")
    return others[int(rng.integers(len(others)))]


def _others(world: World, scene: CaptionQuery, one: ObjectQuery, part: str) -> list[ObjectQuery]:
    """All objects that differ from one of the scene's in its shape, or in its color, and are not in the scene."""
    there = {(item.shape, item.color) for item in scene.objects}
    shapes = [(shape, one.color) for shape in world.shapes]
    colors = [(one.shape, color) for color in world.colors]
    pairs = shapes if part == "shape" else colors
    return [ObjectQuery(shape, color, None) for shape, color in pairs if (shape, color) not in there]


def _seen_from(relation: str, index: int) -> str:
    """Where object `index`, the first or last of a row, lies as seen from its neighbor."""
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    return relation if index == 0 else turned[relation]


def _name(item: ObjectQuery) -> str:
    return f"{item.color} {item.shape}"


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
