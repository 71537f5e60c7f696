"""Captions of scenes, and back: `write_captions` says a scene in several ways, `parse_caption` reads one.

The reader is wider than the writer: it takes any case, punctuation and, where the meaning stays clear, word order.
What a caption does not name is None in its `CaptionQuery` and is not scored.
"""

import dataclasses
import re
from collections.abc import Mapping

from data.scenes.scene import Scene, SceneObject, World

# How the writer says a size or a relation when it does not use the plain word; the reader takes all of them.
_SIZE_WORDS: Mapping[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
_RELATION_PHRASES: Mapping[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath", "underneath"),
}
_SPELLINGS: Mapping[str, str] = {"grey": "gray"}
_ARTICLES = frozenset({"a", "an", "the"})
# After an object, these announce one more attribute of it: "a circle in red", "a circle that is small".
_CONTINUATIONS = frozenset({"in", "is", "that", "which", "colored"})
_FILLERS = frozenset(
    ("and", "with", "on", "of", "there", "one", "single", "picture", "image", "photo", "drawing", "showing", "shows")
    + ("background", "color", "shape", "object")
)


@dataclasses.dataclass(frozen=True)
class ObjectQuery:
    """What a caption says of one object; None where it does not say."""

    shape: str
    color: str | None
    size: str | None


@dataclasses.dataclass(frozen=True)
class CaptionQuery:
    """What a caption says of a picture.

    Attributes:
      background: its name, or None.
      objects: the objects, in the order in which `relation` speaks of them.
      relation: where each object lies as seen from the next, or None.
    """

    background: str | None
    objects: tuple[ObjectQuery, ...]
    relation: str | None

    @property
    def complete(self) -> bool:
        """Whether every attribute is named, so that the caption describes one scene and no other."""
        return (
            self.background is not None
            and all(item.color is not None and item.size is not None for item in self.objects)
            and (len(self.objects) == 1 or self.relation is not None)
        )


def write_captions(world: World, scene: Scene) -> tuple[str, ...]:
    """Says a scene in several ways.

    Args:
      world: the scene's world; its words are the captions' words.
      scene: what to say.

    Returns:
      Distinct lower-case captions, always in the same order: five that name every attribute, then two brief ones that
      leave out the background, the last also the sizes. At most 10 words for one object, 17 for two, 25 for three.
    """
    background = scene.background
    if len(scene.objects) == 1:
        (item,) = scene.objects
        plain, other = _adjectives(item), _adjectives(item, 1)
        return (
            f"a {plain} {item.shape} on a {background} background",
            f"a {plain} {item.shape} on {background}",
            f"on a {background} background there is a {other} {item.shape}",
            f"a {_SIZE_WORDS[item.size][1]} {item.shape} in {item.color} on a {background} background",
            f"a picture of a {plain} {item.shape} on {background}",
            f"a {plain} {item.shape}",
            f"{_with_article(item.color)} {item.shape}",
        )
    first, second = (f" {phrase} " for phrase in _RELATION_PHRASES[scene.relation][:2])
    plain = [f"a {_adjectives(item)} {item.shape}" for item in scene.objects]
    other = [f"a {_adjectives(item, 1)} {item.shape}" for item in scene.objects]
    bare = [f"{_with_article(item.color)} {item.shape}" for item in scene.objects]
    return (
        f"{first.join(plain)} on a {background} background",
        f"{second.join(plain)} on {background}",
        f"on a {background} background {other[0]} is{second}{second.join(other[1:])}",
        f"a picture of {first.join([plain[0], *other[1:]])} on {background}",
        f"on {background} there is {first.join([other[0], *plain[1:]])}",
        first.join(plain),
        second.join(bare),
    )


def parse_caption(world: World, text: str) -> CaptionQuery:
    """Reads a caption.

    Args:
      world: the world whose words it uses.
      text: the caption, such as "A small red circle."

    Returns:
      What it says.

    Raises:
      ValueError: in one line, if it has an unknown word, no shape, too many objects, two values for one attribute, or
        a relation that does not stand between all objects; names the word and what is understood.
    """
    words = [_SPELLINGS.get(word, word) for word in re.findall(r"\w+", text.lower())]
    return _Reader(world, text).read(words)


def _adjectives(item: SceneObject, synonym: int = 0) -> str:
    """Size and color in the usual order, the size in its plain word or in a synonym."""
    return f"{_SIZE_WORDS[item.size][synonym]} {item.color}"


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


class _Reader:
    """One pass over a caption's words: adjectives wait for their noun, a noun makes an object."""

    def __init__(self, world: World, text: str):
        self.world = world
        self.text = text
        self.sizes = {word: size for size in world.sizes for word in _SIZE_WORDS[size]}
        # Longest first, so that "to the left of" is not read as "left of" after two stray words.
        phrases = [(phrase.split(), name) for name in world.relations for phrase in _RELATION_PHRASES[name]]
        self.phrases = sorted(phrases, key=lambda phrase: -len(phrase[0]))
        self.background: str | None = None
        self.relation: str | None = None
        self.relations = 0
        self.relation_first = False  # "left of a square, a circle": the noun after it is objects[1]
        self.objects: list[dict[str, str | None]] = []
        self.waiting: dict[str, str] = {}

    def read(self, words: list[str]) -> CaptionQuery:
        """Returns what the words say."""
        continues = False
        place = 0
        while place < len(words):
            length = self._relation(words[place:])
            if length:
                continues = False
                place += length
                continue
            word = words[place]
            if word in self.world.shapes:
                self.objects.append({"shape": word, "color": None, "size": None} | self.waiting)
                self.waiting = {}
                continues = False
            elif word in self.world.colors or word in self.sizes:
                attribute, value = ("color", word) if word in self.world.colors else ("size", self.sizes[word])
                target = self.objects[-1] if continues and self.objects else self.waiting
                self._name(target, attribute, value)
            elif word in self.world.backgrounds:
                self._name_background(words, place)
            elif word in _CONTINUATIONS:
                continues = True
            elif word in _ARTICLES:
                continues = False
            elif word not in _FILLERS:
                self._fail(f"has the unknown word {word!r}; understood are {self._vocabulary()}")
            place += 1
        return self._query()

    def _relation(self, words: list[str]) -> int:
        """Reads a relation at the start of `words`; returns how many words it took."""
        for phrase, name in self.phrases:
            if words[: len(phrase)] == phrase:
                # Three objects in a row have it twice.
                if self.relation is not None and (name != self.relation or self.world.max_objects < 3):
                    self._fail(f"names two relations, {self.relation!r} and {name!r}")
                self.relation = name
                self.relations += 1
                self.relation_first |= not self.objects
                return len(phrase)
        return 0

    def _name_background(self, words: list[str], place: int) -> None:
        """Reads words[place] as the background where it is said to be one: "on (a) black", "black background"."""
        before = [word for word in words[max(place - 2, 0) : place] if word not in _ARTICLES]
        if before[-1:] != ["on"] and words[place + 1 : place + 2] != ["background"]:
            colors = ", ".join(self.world.colors)
            self._fail(f"gives an object the color {words[place]}, which is only a background; colors are {colors}")
        if self.background not in (None, words[place]):
            self._fail(f"names two backgrounds, {self.background} and {words[place]}")
        self.background = words[place]

    def _query(self) -> CaptionQuery:
        """Checks the whole and returns it."""
        if not self.objects:
            self._fail(f"names no shape; shapes are {', '.join(self.world.shapes)}")
        if len(self.objects) > self.world.max_objects:
            self._fail(f"names {len(self.objects)} objects; a picture of {self.world.name} has {self._limit()}")
        for attribute, value in self.waiting.items():  # "red circle, small"
            self._name(self.objects[-1], attribute, value)
        if self.relation is not None and len(self.objects) == 1:
            self._fail(f"says {self.relation!r} of one object; a relation needs two")
        needed = len(self.objects) - 1
        if self.relations not in (0, needed) or (self.relation_first and needed > 1):
            self._fail(f"does not say {self.relation!r} once between any two of its {len(self.objects)} objects")
        objects = [ObjectQuery(**item) for item in self.objects]
        if self.relation_first:
            objects.reverse()
        return CaptionQuery(self.background, tuple(objects), self.relation)

    def _name(self, target: dict[str, str | None], attribute: str, value: str) -> None:
        """Sets an attribute that has no other value yet."""
        if target.get(attribute) not in (None, value):
            self._fail(f"gives one object two {attribute}s, {target[attribute]} and {value}")
        target[attribute] = value

    def _limit(self) -> str:
        return ("one", "at most two", "at most three")[self.world.max_objects - 1]

    def _vocabulary(self) -> str:
        """What a caption of this world may name."""
        kinds = {
            "shapes": self.world.shapes,
            "colors": self.world.colors,
            "sizes": self.world.sizes,
            "backgrounds": self.world.backgrounds,
            "relations": self.world.relations,
        }
        return "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names)

    def _fail(self, problem: str) -> None:
        raise ValueError(f"the caption {self.text!r} {problem}")
