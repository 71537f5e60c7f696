"""The exact grader: what it must accept, and what it must not."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from data import scenes
from data.scenes.grader import FOREGROUND_DISTANCE, SceneGrader, summarize

WORLDS = pytest.mark.parametrize("name", list(scenes.WORLDS))


@pytest.fixture(scope="module")
def graders():
    """A grader of each world; building the templates takes a while."""
    return {name: SceneGrader(world) for name, world in scenes.WORLDS.items()}


def draw(world: scenes.World, count: int, seed: int = 0):
    """Returns scenes (every other one with a held-out pair) and their pictures."""
    rng = np.random.default_rng(seed)
    drawn, pictures = [], []
    for k in range(count):
        drawn.append(scenes.sample_scene(world, rng, held_out=k % 2 == 1))
        pictures.append(scenes.render(world, drawn[-1], scenes.sample_layout(world, drawn[-1], rng)))
    return drawn, np.stack(pictures)


def picture(world: scenes.World, scene: scenes.Scene, *places: tuple[float, float, float]) -> np.ndarray:
    """Draws a scene with objects at the given (x, y, diameter)."""
    layout = scenes.Layout(tuple((float(x), float(y)) for x, y, _ in places), tuple(float(d) for *_, d in places))
    return scenes.render(world, scene, layout)


def soften(pictures: np.ndarray, blur: float, noise: float) -> np.ndarray:
    """Blurs pictures, adds Gaussian noise and rounds."""
    values = ndimage.gaussian_filter(pictures.astype(np.float32), (0, blur, blur, 0))
    values += np.random.default_rng(1).normal(0, noise, pictures.shape)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


@WORLDS
@pytest.mark.parametrize(("blur", "noise"), [(0, 0), (0, 8), (0.7, 0), (0.7, 4)])
def test_true_pictures_are_right_also_under_noise_and_blur(graders, name, blur, noise):
    world = scenes.WORLDS[name]
    drawn, pictures = draw(world, 150)
    captions = [scenes.write_captions(world, scene)[k % 7] for k, scene in enumerate(drawn)]
    totals = summarize(graders[name].grade(captions, soften(pictures, blur, noise)))
    assert list(totals)[0] == "all"
    right, counted = totals["all"]
    assert counted == 150
    assert right == counted, totals


@WORLDS
def test_a_caption_with_one_attribute_changed_is_rejected(graders, name):
    world = scenes.WORLDS[name]
    drawn, pictures = draw(world, 120)
    words = {"shape": world.shapes, "color": tuple(world.colors), "size": tuple(world.sizes)}
    keys, captions, images = [], [], []
    for k, (scene, image) in enumerate(zip(drawn, pictures, strict=True)):
        changed = {}
        place = k % len(scene.objects)
        for key, names in words.items():
            items = list(scene.objects)
            others = [value for value in names if value != getattr(items[place], key)]
            items[place] = dataclasses.replace(items[place], **{key: others[k % len(others)]})
            changed[key] = dataclasses.replace(scene, objects=tuple(items))
        others = [value for value in world.backgrounds if value != scene.background]
        changed["background"] = dataclasses.replace(scene, background=others[k % len(others)])
        if scene.relation:
            others = [value for value in world.relations if value != scene.relation]
            changed["relation"] = dataclasses.replace(scene, relation=others[k % len(others)])
            fewer = scene.objects[:-1]
            relation = scene.relation if len(fewer) > 1 else None
            changed["count"] = dataclasses.replace(scene, objects=fewer, relation=relation)
        keys += changed
        captions += [scenes.write_captions(world, other)[0] for other in changed.values()]
        images += [image] * len(changed)
    for key, caption, score in zip(keys, captions, graders[name].grade(captions, np.stack(images)), strict=True):
        assert not score["all"], (key, caption)
        # A swap of a shape, say, may be scored under another assignment of objects: only `all` has to see it.
        assert key not in ("count", "background") or not score[key], (key, caption)


def test_a_reading_names_everything(graders):
    world = scenes.WORLDS["pair32"]
    objects = (scenes.SceneObject("ring", "cyan", "small"), scenes.SceneObject("star", "red", "large"))
    scene = scenes.Scene("navy", objects, "right of")
    reading = graders["pair32"].read(picture(world, scene, (24.25, 15.5, 9.0), (8.0, 17.75, 12.5)))
    star, ring = reading.objects
    assert (star.shape, star.color, star.size) == ("star", "red", "large")
    assert (ring.shape, ring.color, ring.size) == ("ring", "cyan", "small")
    assert star.center == (8.0, 17.75) and ring.center == (24.25, 15.5)
    assert reading.background == "navy" and reading.relation == "left of"


def test_a_row_of_three_is_read_in_any_order_that_is_true(graders):
    world, grade = scenes.WORLDS["pair64"], graders["pair64"].score
    objects = [scenes.SceneObject(*item) for item in (("star", "red", "large"), ("ring", "cyan", "small"))]
    objects.append(scenes.SceneObject("star", "blue", "large"))
    places = ((12.25, 30, 15), (32, 36.5, 9.5), (51.5, 29, 15.5))
    image = picture(world, scenes.Scene("navy", tuple(objects), "left of"), *places)
    assert graders["pair64"].read(image).relation == "left of"
    assert grade("a red star left of a cyan ring left of a blue star on navy", image)["all"]
    assert grade("a blue star right of a cyan ring to the right of a red star", image)["all"]
    assert grade("a star, a star and a ring", image)["all"]
    swapped = grade("a blue star left of a cyan ring left of a red star", image)
    assert not swapped["all"] and swapped["count"]
    assert not grade("a red star left of a blue star left of a cyan ring", image)["all"]
    assert not grade("a red star above a cyan ring above a blue star", image)["relation"]
    assert not grade("a red star left of a cyan ring", image)["count"]


def test_only_what_the_caption_names_is_scored(graders):
    world = scenes.WORLDS["single32"]
    scene = scenes.Scene("gray", (scenes.SceneObject("star", "red", "large"),))
    image = picture(world, scene, (16, 16, 20))
    grade = graders["single32"].score
    assert grade("A red star.", image) == {"all": True, "count": True, "shape": True, "color": True}
    assert grade("a small blue star on gray", image) == {
        "all": False,
        "count": True,
        "background": True,
        "shape": True,
        "color": False,
        "size": False,
    }
    with pytest.raises(ValueError, match="unknown word 'pink'"):
        grade("a pink star", image)
    with pytest.raises(ValueError, match="32 x 32 pixels, not 64 x 64"):
        grade("a red star", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="2 captions for 1 pictures"):
        graders["single32"].grade(["a red star"] * 2, image[None])


def test_attributes_belong_to_their_object(graders):
    world = scenes.WORLDS["pair32"]
    objects = (scenes.SceneObject("circle", "red", "small"), scenes.SceneObject("square", "blue", "small"))
    image = picture(world, scenes.Scene("black", objects, "above"), (16, 8, 8.5), (17, 24, 8.5))
    grade = graders["pair32"].score
    assert grade("a red circle above a blue square", image)["all"]
    assert grade("a blue square below a red circle", image)["all"]
    assert not grade("a blue circle above a red square", image)["all"]
    assert not grade("a blue square above a red circle", image)["all"]
    alone = grade("a red circle", image)
    assert not alone["count"] and alone["shape"] and alone["color"] and not alone["all"]


@WORLDS
def test_a_blank_picture_and_pure_noise_fail(graders, name):
    side = scenes.WORLDS[name].image_size
    blank = np.full((side, side, 3), 10, np.uint8)
    score = graders[name].score("a red circle on black", blank)
    assert score == {"all": False, "count": False, "background": True, "shape": False, "color": False}
    noise = np.random.default_rng(0).integers(0, 256, (20, side, side, 3)).astype(np.uint8)
    longest = ", ".join(["a circle"] * scenes.WORLDS[name].max_objects)
    scores = graders[name].grade(["a circle", longest] * 10, noise)
    assert summarize(scores)["all"] == (0, 20)
    assert graders[name].read(np.full((side, side, 3), (255, 0, 255), np.uint8)).background is None


def test_a_malformed_object_has_no_shape(graders):
    world = scenes.WORLDS["single32"]
    grader = graders["single32"]

    def draw_one(shape: str, color: str = "white", diameter: float = 20) -> np.ndarray:
        scene = scenes.Scene("black", (scenes.SceneObject(shape, color, "large"),))
        return picture(world, scene, (16, 16, diameter))

    square, circle = draw_one("square"), draw_one("circle")
    bitten = square.copy()
    bitten[:16, :16] = 10
    halves = np.where(np.arange(32)[:, None, None] < 16, square, circle)
    between = ((square.astype(int) + circle) // 2).astype(np.uint8)
    two_colors = np.where(np.arange(32)[:, None] < 16, draw_one("star", "red"), draw_one("star", "blue"))
    for image in (bitten, halves, between, two_colors, draw_one("square", diameter=16)):
        (item,) = grader.read(image).objects
        assert item.shape is None, item
    assert grader.read(square).objects[0].shape == "square"


def test_a_color_that_is_none_of_the_world_has_no_name(graders):
    scene = scenes.Scene("black", (scenes.SceneObject("circle", "white", "large"),))
    image = picture(scenes.WORLDS["single32"], scene, (16, 16, 20))
    image = np.where(image > 128, np.array([255, 0, 160], np.uint8), image)
    (item,) = graders["single32"].read(image).objects
    assert item.color is None and item.shape == "circle"


def test_a_color_that_faded_a_little_keeps_its_name(graders):
    scene = scenes.Scene("black", (scenes.SceneObject("circle", "white", "large"),))
    image = picture(scenes.WORLDS["single32"], scene, (16, 16, 20))
    assert graders["single32"].read((image * 0.83).astype(np.uint8)).objects[0].color == "white"
    assert graders["single32"].read((image * 0.6).astype(np.uint8)).objects[0].color is None


def test_specks_and_faint_smears_are_no_objects_but_a_second_shape_is(graders):
    world = scenes.WORLDS["pair32"]
    scene = scenes.Scene("black", (scenes.SceneObject("circle", "red", "small"),))
    image = picture(world, scene, (10, 10, 8.5))
    image[28:30, 28:30] = 255  # four pixels
    image[25:31, 2:8] += 30
    assert graders["pair32"].score("a red circle", image)["all"]
    image[24:30, 24:30] = 255
    assert not graders["pair32"].score("a red circle", image)["count"]


def test_two_objects_whose_blurred_edges_meet_are_still_two(graders):
    world = scenes.WORLDS["pair32"]
    objects = (scenes.SceneObject("square", "white", "large"), scenes.SceneObject("circle", "yellow", "large"))
    image = picture(world, scenes.Scene("black", objects, "left of"), (9, 16, 13), (22.5, 16, 13))
    image = soften(image[None], 0.7, 0)[0]
    above = np.linalg.norm(image - 10.0, axis=-1) > FOREGROUND_DISTANCE
    assert ndimage.label(above, output=np.empty(above.shape, np.int32)) == 1
    assert graders["pair32"].score("a large white square left of a large yellow circle", image)["all"]
