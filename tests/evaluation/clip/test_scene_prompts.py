"""Descriptions of scenes: a prompt ensemble holds what it says, alternatives differ in one thing."""

import pytest

from data.scenes import WORLDS, Scene, SceneObject, parse_caption
from evaluation.clip.scene_prompts import alternatives, attribute_values, captions_of, class_prompts

WORLD = WORLDS["pair32"]
PAIR = Scene("navy", (SceneObject("circle", "red", "small"), SceneObject("square", "blue", "large")), "above")


@pytest.mark.parametrize("attribute", ["shape", "color", "size", "background"])
def test_a_class_has_every_caption_with_its_value(attribute):
    prompts = class_prompts(WORLD, attribute)
    assert len(prompts) == len(attribute_values(WORLD)[attribute])
    assert len({text for texts in prompts for text in texts}) == 8 * 8 * 2 * 4
    for value, texts in zip(attribute_values(WORLD)[attribute], prompts, strict=True):
        for text in texts[::17]:
            query = parse_caption(WORLD, text)
            assert value == (query.background if attribute == "background" else getattr(query.objects[0], attribute))


def test_alternatives_change_one_attribute_of_one_object():
    assert [scene.relation for scene in alternatives(WORLD, PAIR, "relation")] == [
        "above",
        "left of",
        "right of",
        "below",
    ]
    shapes = alternatives(WORLD, PAIR, "shape", 1)
    assert shapes[0] == PAIR and len(shapes) == 8
    assert all(scene.objects[0] == PAIR.objects[0] and scene.objects[1].color == "blue" for scene in shapes)
    assert len(set(captions_of(WORLD, shapes))) == 8


def test_no_alternative_has_two_objects_that_a_brief_caption_confuses():
    twins = Scene("navy", (SceneObject("circle", "red", "small"), SceneObject("square", "red", "large")), "above")
    assert all(len({(o.shape, o.color) for o in s.objects}) == 2 for s in alternatives(WORLD, twins, "shape", 0))
    assert len(alternatives(WORLD, twins, "shape", 0)) == 7
