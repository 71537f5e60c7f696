"""Descriptions of scenes to classify pictures of the embedded dataset by, an attribute at a time."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from data.scenes import Scene, SceneObject, World, write_captions

OBJECT_ATTRIBUTES = ("shape", "color", "size")


def attribute_values(world: World) -> dict[str, tuple[str, ...]]:
    """The values of each attribute of a scene."""
    return {
        "shape": world.shapes,
        "color": tuple(world.colors),
        "size": tuple(world.sizes),
        "background": tuple(world.backgrounds),
        "relation": tuple(world.relations),
    }


def scene_of(record: Mapping[str, Any], world: World) -> Scene:
    """The scene of a stored record, whose labels are numbers."""
    values = attribute_values(world)
    objects = record["objects"]
    items = [
        SceneObject(**{name: values[name][int(objects[name][i])] for name in OBJECT_ATTRIBUTES})
        for i in range(len(objects["shape"]))
    ]
    relation = int(record["relation"])  # 0 is "none"
    background = values["background"][int(record["background"])]
    return Scene(background, tuple(items), values["relation"][relation - 1] if relation else None)


def class_prompts(world: World, attribute: str) -> list[list[str]]:
    """For each value of an attribute, captions of all scenes of one object that have it: a prompt ensemble."""
    values = attribute_values(world)
    scenes = [
        Scene(background, (SceneObject(shape, color, size),))
        for shape, color, size, background in itertools.product(
            *(values[name] for name in (*OBJECT_ATTRIBUTES, "background"))
        )
    ]
    labels = [scene_label(world, scene, attribute) for scene in scenes]
    return [
        captions_of(world, [scene for scene, label in zip(scenes, labels, strict=True) if label == number])
        for number in range(len(values[attribute]))
    ]


def alternatives(world: World, scene: Scene, attribute: str, place: int = 0) -> list[Scene]:
    """The scene first, then what it would be with each other value of one attribute.

    Args:
      world: of the scene.
      scene: what a picture shows.
      attribute: a key of `attribute_values`.
      place: of the object whose attribute it is.

    Returns:
      Scenes that can be told apart by a caption: none whose two objects have the same shape and color.
    """
    changed = []
    for value in attribute_values(world)[attribute]:
        if attribute in OBJECT_ATTRIBUTES:
            objects = list(scene.objects)
            objects[place] = dataclasses.replace(objects[place], **{attribute: value})
            other = dataclasses.replace(scene, objects=tuple(objects))
        else:
            other = dataclasses.replace(scene, **{attribute: value})
        kinds = {(item.shape, item.color) for item in other.objects}
        if other != scene and len(kinds) == len(other.objects):
            changed.append(other)
    return [scene, *changed]


def scene_label(world: World, scene: Scene, attribute: str) -> int:
    """The number of an attribute's value in a scene of one object, else -1."""
    item, *others = scene.objects
    value = scene.background if attribute == "background" else getattr(item, attribute)
    return -1 if others else attribute_values(world)[attribute].index(value)


def captions_of(world: World, scenes: Sequence[Scene]) -> list[str]:
    """The first, complete caption of each scene."""
    return [write_captions(world, scene)[0] for scene in scenes]
