"""Captions that are written are graded by pictures, also those that cannot be read."""

import numpy as np

from data import scenes
from evaluation.written_captions import grade_captions


def test_captions_are_right_incomplete_wrong_or_not_to_be_read():
    world = scenes.WORLDS["single32"]
    rng = np.random.default_rng(0)
    scene = scenes.sample_scene(world, rng, held_out=False)
    images = np.stack([scenes.render(world, scene, scenes.sample_layout(world, scene, rng))] * 4)
    (shown,) = scene.objects
    other = next(color for color in world.colors if color != shown.color)
    whole = f"a {shown.size} {shown.color} {shown.shape} on a {scene.background} background"
    texts = [whole, f"a {shown.color} {shown.shape}", whole.replace(shown.color, other), "red red of"]
    record = grade_captions(world, texts, images)
    values, counted = record["values"], record["counted"]
    assert (values["all"], values["complete"], values["readable"]) == (0.5, 0.25, 0.75)
    assert (values["color"], values["shape"], values["size"]) == (2 / 3, 1.0, 1.0)
    assert (counted["all"], counted["color"], counted["size"]) == (4, 3, 2)
    assert grade_captions(world, ["nonsense"], images[:1])["values"] == {"all": 0.0, "complete": 0.0, "readable": 0.0}
