"""What a picture of the embedded dataset shows, and the worlds such pictures come from.

A `World` is one builder config: its words, its RGB values and its geometry. A `Scene` is what a caption says of a
picture; where its objects lie is a `data.scenes.render.Layout`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

RGB = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object, in the words of its world."""

    shape: str
    color: str
    size: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
      background: name of the background.
      objects: one to three objects; any two differ in shape or color, so that a caption can tell them apart.
      relation: where each object lies as seen from the next, such as "left of"; None for a single object.
    """

    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """The words and the geometry of one builder config. Lengths are pixels; positions lie on a 1/4-pixel grid.

    Attributes:
      name: name of the builder config.
      image_size: height and width of a picture.
      shapes: names of shapes; `data.scenes.render` draws them.
      colors: color name -> RGB.
      sizes: size name -> diameter.
      backgrounds: background name -> RGB; no name is also a color's, so a caption may name them in any order.
      relations: relation name -> unit vector (x, y) from each object to the one before it; y points down.
      max_objects: most objects in a scene, 1 to 3.
      held_out: (shape, color) pairs that the training split never shows.
      diameter_jitter: a diameter is its size's by -jitter, 0 or +jitter.
      center_jitter: a single object's center is the picture's by at most this, in x and in y.
      pair_share: share of scenes that have two objects.
      triple_share: share of scenes that have three.
      pair_distance: mean distance of neighbors' centers along the axis of their relation.
      pair_along_jitter: each center moves by at most this along that axis,
      pair_across_jitter: and by at most this across it,
      pair_across_distance: where any two centers differ by at most this.
    """

    name: str
    image_size: int
    shapes: tuple[str, ...]
    colors: Mapping[str, RGB]
    sizes: Mapping[str, float]
    backgrounds: Mapping[str, RGB]
    relations: Mapping[str, tuple[int, int]]
    max_objects: int
    held_out: frozenset[tuple[str, str]]
    diameter_jitter: float
    center_jitter: float
    pair_share: float = 0.0
    triple_share: float = 0.0
    pair_distance: float = 0.0
    pair_along_jitter: float = 0.0
    pair_across_jitter: float = 0.0
    pair_across_distance: float = 0.0

    def is_held_out(self, scene: Scene) -> bool:
        """Returns whether the scene has an object whose (shape, color) the training split never shows."""
        return any((item.shape, item.color) in self.held_out for item in scene.objects)


# Any two colors or backgrounds lie at least 96 apart in RGB: noise of a few units never turns one into another.
_COLORS: Mapping[str, RGB] = {
    "red": (220, 30, 45),
    "green": (30, 165, 55),
    "blue": (50, 90, 250),
    "yellow": (255, 235, 60),
    "purple": (175, 65, 215),
    "orange": (245, 130, 20),
    "cyan": (60, 215, 230),
    "white": (250, 250, 250),
}
_BACKGROUNDS: Mapping[str, RGB] = {
    "black": (10, 10, 10),
    "gray": (125, 125, 125),
    "navy": (15, 25, 105),
    "brown": (100, 60, 25),
}
_RELATIONS: Mapping[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def _single32() -> World:
    """One object of 5 shapes x 6 colors x 2 sizes on 3 backgrounds: what a CPU learns in minutes."""
    shapes = ("circle", "square", "triangle", "star", "cross")
    colors = ("red", "green", "blue", "yellow", "purple", "white")
    return World(
        name="single32",
        image_size=32,
        shapes=shapes,
        colors=MappingProxyType({name: _COLORS[name] for name in colors}),
        sizes=MappingProxyType({"small": 12.0, "large": 20.0}),
        backgrounds=MappingProxyType({name: _BACKGROUNDS[name] for name in ("black", "gray", "brown")}),
        relations=MappingProxyType({}),
        max_objects=1,
        # One pair per shape and at most one per color: each remains in training with nearly every partner.
        held_out=frozenset((shape, colors[(i + 2) % len(colors)]) for i, shape in enumerate(shapes)),
        diameter_jitter=0.5,
        center_jitter=3.5,
    )


def _heart32() -> World:
    """The pictures of single32 with a shape that it never shows, in the training split alone: for fine-tuning."""
    single = _single32()
    return dataclasses.replace(
        single,
        name="heart32",
        shapes=(*single.shapes, "heart"),
        held_out=frozenset((shape, color) for shape in single.shapes for color in single.colors),
    )


def _pair32() -> World:
    """One or two objects of 8 shapes x 8 colors x 2 sizes on 4 backgrounds, in 4 relations: the benchmark."""
    shapes = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
    colors = tuple(_COLORS)
    return World(
        name="pair32",
        image_size=32,
        shapes=shapes,
        colors=MappingProxyType(dict(_COLORS)),
        sizes=MappingProxyType({"small": 8.5, "large": 12.5}),
        backgrounds=MappingProxyType(dict(_BACKGROUNDS)),
        relations=MappingProxyType(dict(_RELATIONS)),
        max_objects=2,
        held_out=frozenset((shape, colors[(3 * i + 1) % len(colors)]) for i, shape in enumerate(shapes)),
        diameter_jitter=0.5,
        center_jitter=6.0,
        pair_share=0.6,
        pair_distance=16.0,
        pair_along_jitter=0.5,
        pair_across_jitter=4.0,
        pair_across_distance=5.0,
    )


def _pair64() -> World:
    """The words of pair32, up to three objects in a row, on four times as many pixels: for a GPU."""
    return dataclasses.replace(
        _pair32(),
        name="pair64",
        image_size=64,
        sizes=MappingProxyType({"small": 9.5, "large": 15.0}),
        max_objects=3,
        center_jitter=20.0,
        pair_share=0.3,
        triple_share=0.4,
        pair_distance=20.0,
        pair_across_jitter=16.0,
        pair_across_distance=10.0,
    )


WORLDS: Mapping[str, World] = MappingProxyType(
    {world.name: world for world in (_single32(), _pair32(), _pair64(), _heart32())}
)


def find_world(dataset: str) -> World | None:
    """The world of a dataset's name, `scenes/<world>`; None for any other dataset."""
    return {f"scenes/{name}": world for name, world in WORLDS.items()}.get(dataset)


def sample_scene(world: World, rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draws a scene.

    Args:
      world: the world it comes from.
      rng: source of randomness.
      held_out: whether at least one object is of a held-out pair; otherwise none is.

    Returns:
      The scene. All allowed (shape, color) pairs, sizes, backgrounds and relations are equally likely.
    """
    pairs = [(shape, color) for shape in world.shapes for color in world.colors]
    forbidden = frozenset() if held_out else world.held_out
    allowed = [pair for pair in pairs if pair not in forbidden]
    draw = rng.random()
    count = 3 if draw < world.triple_share else 2 if draw < world.triple_share + world.pair_share else 1
    chosen: list[tuple[str, str]] = []
    if held_out:
        held = [pair for pair in pairs if pair in world.held_out]
        chosen.append(held[rng.integers(len(held))])
    while len(chosen) < count:
        pair = allowed[rng.integers(len(allowed))]
        if pair not in chosen:
            chosen.append(pair)
    # So that a held-out pair is in each place as often.
    if count > 2:
        chosen = [chosen[place] for place in rng.permutation(count)]
    elif rng.integers(2):
        chosen.reverse()
    sizes, backgrounds, relations = tuple(world.sizes), tuple(world.backgrounds), tuple(world.relations)
    objects = tuple(SceneObject(shape, color, sizes[rng.integers(len(sizes))]) for shape, color in chosen)
    background = backgrounds[rng.integers(len(backgrounds))]
    relation = relations[rng.integers(len(relations))] if count > 1 else None
    return Scene(background, objects, relation)
