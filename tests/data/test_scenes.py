"""The embedded dataset's scenes, pictures and captions."""

import hashlib
import itertools

import numpy as np
import pytest

from data import scenes
from data.scenes.render import coverage

WORLDS = pytest.mark.parametrize("world", scenes.WORLDS.values(), ids=scenes.WORLDS)


def draw(world: scenes.World, count: int, held_out: bool = False, seed: int = 0):
    """Yields scenes with their layouts."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scene = scenes.sample_scene(world, rng, held_out)
        yield scene, scenes.sample_layout(world, scene, rng)


@WORLDS
def test_colors_can_be_told_apart(world):
    palette = list(world.colors.values()) + list(world.backgrounds.values())
    distances = [np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(palette, 2)]
    assert min(distances) > 95
    assert not set(world.colors) & set(world.backgrounds)


@WORLDS
def test_training_never_shows_a_held_out_pair_and_held_out_always_does(world):
    seen = set()
    for scene, _ in draw(world, 1500):
        assert not world.is_held_out(scene)
        seen |= {(item.shape, item.color) for item in scene.objects}
        assert 1 <= len(scene.objects) <= world.max_objects
        assert (scene.relation is None) == (len(scene.objects) == 1)
    everything = set(itertools.product(world.shapes, world.colors))
    assert seen == everything - world.held_out
    shown = [scene for scene, _ in draw(world, 300, held_out=True)]
    assert all(world.is_held_out(scene) for scene in shown)
    pairs = [{(item.shape, item.color) for item in scene.objects} for scene in shown]
    assert set.union(*pairs) >= world.held_out
    if world.name == "heart32":  # whose training shows one shape
        assert {shape for shape, _ in seen} == {"heart"}
        return
    # Nothing is held out so often that training lacks a shape or a color.
    for k, names in enumerate((world.shapes, world.colors)):
        assert all(sum(pair[k] == name for pair in world.held_out) <= 1 for name in names)


@WORLDS
def test_objects_differ_in_what_a_brief_caption_names(world):
    for scene, _ in draw(world, 500):
        assert len({(item.shape, item.color) for item in scene.objects}) == len(scene.objects)


@WORLDS
def test_objects_are_whole_and_apart(world):
    for scene, layout in draw(world, 300):
        background = np.array(world.backgrounds[scene.background])
        touched = []
        for item, center, diameter in zip(scene.objects, layout.centers, layout.diameters, strict=True):
            alone = scenes.Scene(scene.background, (item,))
            picture = scenes.render(world, alone, scenes.Layout((center,), (diameter,)))
            touched.append((picture != background).any(-1))
            whole = coverage(item.shape, diameter, *(round(4 * value) % 4 for value in center))
            assert touched[-1].sum() == (whole > 0).sum()
        if len(touched) == 1:
            (mask,) = touched
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        for mask, other in itertools.combinations(touched, 2):
            assert not (mask & other).any()


@pytest.mark.parametrize("name", ["pair32", "pair64"])
def test_relation_says_where_each_object_lies_as_seen_from_the_next(name):
    world = scenes.WORLDS[name]
    seen = set()
    for scene, layout in draw(world, 300):
        for (x0, y0), (x1, y1) in itertools.pairwise(layout.centers):
            right = {"left of": x0 < x1, "right of": x0 > x1, "above": y0 < y1, "below": y0 > y1}
            assert right[scene.relation]
            assert (abs(x0 - x1) > abs(y0 - y1)) == (scene.relation in ("left of", "right of"))
            seen.add((scene.relation, len(scene.objects)))
    assert seen == set(itertools.product(world.relations, range(2, world.max_objects + 1)))


def test_a_held_out_pair_is_in_each_of_three_places():
    world = scenes.WORLDS["pair64"]
    rows = [scene.objects for scene, _ in draw(world, 300, held_out=True) if len(scene.objects) == 3]
    for place in range(3):
        assert any((row[place].shape, row[place].color) in world.held_out for row in rows)


@pytest.mark.parametrize(
    ("name", "digest"),
    [("single32", "3e284be0f19cd75e"), ("pair32", "b5184940e97fc2d0"), ("pair64", "3e930ff173fbd496")],
)
def test_pictures_are_the_same_to_the_last_bit_everywhere(name, digest):
    world = scenes.WORLDS[name]
    pictures = [scenes.render(world, *pair) for pair in draw(world, 100)]
    assert pictures[0].shape == (world.image_size, world.image_size, 3)
    assert hashlib.sha256(np.stack(pictures).tobytes()).hexdigest()[:16] == digest


def test_coverage_is_anti_aliased_and_exact_to_a_quarter_pixel():
    whole = coverage("circle", 12.0, 0, 0)
    assert whole.sum() / 16 == pytest.approx(np.pi * 36, rel=0.01)
    assert ((whole > 0) & (whole < 16)).any()
    # A step of a quarter pixel moves the center of mass by just that.
    places = np.arange(len(whole))
    masses = [
        float((coverage("circle", 12.0, k, 0).sum(0) * places).sum() / coverage("circle", 12.0, k, 0).sum())
        for k in range(4)
    ]
    np.testing.assert_allclose(np.diff(masses), 0.25, atol=0.02)
    with pytest.raises(ValueError, match="hexagon.*circle"):
        coverage("hexagon", 12.0, 0, 0)


@WORLDS
def test_every_caption_reads_back_as_its_scene(world):
    for scene, _ in draw(world, 150, held_out=True):
        captions = scenes.write_captions(world, scene)
        assert len(set(captions)) == len(captions) == 7
        assert all(caption == caption.lower() for caption in captions)
        limit = (10, 17, 25)[len(scene.objects) - 1]
        assert max(len(caption.split()) for caption in captions) <= limit
        queries = [scenes.parse_caption(world, caption) for caption in captions]
        objects = tuple(scenes.ObjectQuery(item.shape, item.color, item.size) for item in scene.objects)
        for query in queries[:5]:
            assert query == scenes.CaptionQuery(scene.background, objects, scene.relation)
            assert query.complete
        assert queries[5] == scenes.CaptionQuery(None, objects, scene.relation)
        bare = tuple(scenes.ObjectQuery(item.shape, item.color, None) for item in scene.objects)
        assert queries[6] == scenes.CaptionQuery(None, bare, scene.relation)
        assert not queries[5].complete and not queries[6].complete


@pytest.mark.parametrize(
    ("text", "background", "objects", "relation"),
    [
        ("A small red circle.", None, [("circle", "red", "small")], None),
        ("RED CIRCLE, tiny!", None, [("circle", "red", "small")], None),
        ("a circle that is red and big on grey", "gray", [("circle", "red", "large")], None),
        (
            "a circle in red left of a big square",
            None,
            [("circle", "red", None), ("square", None, "large")],
            "left of",
        ),
        ("black background, one star", "black", [("star", None, None)], None),
        (
            "to the left of a blue square, an orange ring",
            None,
            [("ring", "orange", None), ("square", "blue", None)],
            "left of",
        ),
        ("a star and a ring", None, [("star", None, None), ("ring", None, None)], None),
        (
            "an orange heart in the picture is on top of the huge white star on navy",
            "navy",
            [("heart", "orange", None), ("star", "white", "large")],
            "above",
        ),
    ],
)
def test_captions_may_be_worded_freely(text, background, objects, relation):
    expected = scenes.CaptionQuery(background, tuple(scenes.ObjectQuery(*item) for item in objects), relation)
    assert scenes.parse_caption(scenes.WORLDS["pair32"], text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a pink circle", "unknown word 'pink'.*shapes circle.*colors red"),
        ("a red circle 圆", "unknown word '圆'"),
        ("two red circles", "unknown word 'two'"),
        ("something red", "unknown word 'something'"),
        ("red", "names no shape; shapes are circle"),
        ("", "names no shape"),
        ("a black circle", "black, which is only a background; colors are red"),
        ("a red blue circle", "two colors, red and blue"),
        ("a circle on black on navy", "two backgrounds, black and navy"),
        ("a ring above a star below", "two relations, 'above' and 'below'"),
        ("a ring above a star above", "two relations, 'above' and 'above'"),
        ("a red circle above", "a relation needs two"),
        ("a circle and a star and a ring", "3 objects; a picture of pair32 has at most two"),
    ],
)
def test_a_caption_that_cannot_be_read_is_one_clear_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        scenes.parse_caption(scenes.WORLDS["pair32"], text)
    assert "\n" not in str(error.value)


def test_three_objects_stand_in_a_row():
    world = scenes.WORLDS["pair64"]
    row = tuple(scenes.ObjectQuery(shape, None, None) for shape in ("circle", "star", "ring"))
    for text in ("a circle above a star above a ring", "a circle over a star, which is on top of a ring"):
        assert scenes.parse_caption(world, text) == scenes.CaptionQuery(None, row, "above")
    assert scenes.parse_caption(world, "a circle, a star and a ring") == scenes.CaptionQuery(None, row, None)
    for text, message in (
        ("a circle above a star left of a ring", "two relations, 'above' and 'left of'"),
        ("a circle above a star and a ring", "does not say 'above' once between any two of its 3 objects"),
        ("above a circle, a star above a ring", "does not say 'above' once between"),
        ("a circle above a star above", "does not say 'above' once between any two of its 2 objects"),
        ("a circle, a star, a ring and a heart", "4 objects; a picture of pair64 has at most three"),
    ):
        with pytest.raises(ValueError, match=message):
            scenes.parse_caption(world, text)


def test_a_world_knows_only_its_own_words():
    with pytest.raises(ValueError, match="unknown word 'ring'"):
        scenes.parse_caption(scenes.WORLDS["single32"], "a red ring")
    with pytest.raises(ValueError, match="2 objects; a picture of single32 has one"):
        scenes.parse_caption(scenes.WORLDS["single32"], "a red circle and a blue square")
