"""Crops, resizes and flips."""

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from data import preprocess
from data.preprocess import (
    TRANSFORMS,
    adm_evaluation,
    celeba_evaluation,
    center_crop,
    center_square,
    choose_caption,
    clip_evaluation,
    clip_training,
    dalle_training,
    dvae_training,
    first_stage_evaluation,
    random_crop,
    transform_pair,
)


def ramp(height: int, width: int) -> np.ndarray:
    """A picture that grows brighter to the right and redder downwards."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, height)[:, None]
    image[..., 1] = np.linspace(0, 255, width)[None]
    return image


def sizes_for(name: str) -> list[tuple[int, int]]:
    """Heights and widths that a transform takes; only pictures of CelebA have a face at a known place."""
    return [(218, 178)] if name == "celeba_training" else [(40, 60), (60, 40), (50, 50), (16, 20)]


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in TRANSFORMS for shape in sizes_for(name)])
def test_every_transform_gives_the_size_and_follows_its_generator(name, shape):
    pair = transform_pair(name)
    first, again = (pair.training(ramp(*shape), 32, np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert (first == again).all()
    assert pair.evaluation(ramp(*shape), 32, None).shape == (32, 32, 3)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_the_same_in_evaluation_draws_nothing(name):
    """The stream makes no generator for it."""
    pair = transform_pair(name)
    image = ramp(*sizes_for(name)[0])
    pictures = {pair.training(image, 32, np.random.default_rng(seed)).tobytes() for seed in range(8)}
    assert (len(pictures) == 1) == (pair.training is pair.evaluation)
    known = (center_square, center_crop, clip_evaluation, celeba_evaluation, adm_evaluation, first_stage_evaluation)
    assert pair.evaluation in known


def test_a_first_stage_sees_two_thirds_of_the_short_side():
    image = ramp(60, 40)
    resized = np.asarray(Image.fromarray(image).resize((48, 72), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        transform_pair("first_stage_training").evaluation(image, 32, None), resized[20:52, 8:40]
    )
    crop = transform_pair("first_stage_training").training(image, 32, np.random.default_rng(0))
    places = [(top, left) for top in range(41) for left in range(17)]
    assert any(np.array_equal(crop, resized[top : top + 32, left : left + 32]) for top, left in places)


@pytest.mark.parametrize("name", ["center_square_flip", "celeba_training", "adm_training"])
def test_half_of_the_pictures_are_mirrored_and_nothing_else_happens(name):
    pair = transform_pair(name)
    image = ramp(218, 178)
    plain = pair.evaluation(image, 64, None)
    mirrored = 0
    for seed in range(200):
        picture = pair.training(image, 64, np.random.default_rng(seed))
        mirrored += (picture == plain[:, ::-1]).all()
        assert (picture == plain).all() or (picture == plain[:, ::-1]).all()
    assert 70 < mirrored < 130


def test_the_face_of_celeba_is_around_its_published_center():
    image = np.random.default_rng(0).integers(0, 256, (218, 178, 3), np.uint8)
    assert (celeba_evaluation(image, 128) == image[57:185, 25:153]).all()
    smooth = ramp(218, 178)
    halved = smooth[57:185, 25:153].astype(float).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(celeba_evaluation(smooth, 64) - halved).max() < 1.5  # less than a pixel's step
    with pytest.raises(UserError, match="64 x 64 is no aligned one of CelebA"):
        celeba_evaluation(image[:64, :64], 64)


def test_adm_halves_by_averages_and_keeps_the_center():
    image = np.random.default_rng(0).integers(0, 256, (256, 384, 3), np.uint8)
    averaged = image.astype(float).reshape(64, 4, 96, 4, 3).mean((1, 3))
    difference = adm_evaluation(image, 64) - averaged[:, 16:80]
    assert np.abs(difference).max() < 2  # rounded after each halving
    gray = image[..., :1]
    assert (adm_evaluation(gray, 64) == adm_evaluation(np.repeat(gray, 3, axis=-1), 64)).all()
    assert (adm_evaluation(image[:64, :64], 64) == image[:64, :64]).all()


def test_clip_sees_the_whole_short_side_in_training_and_evaluation():
    image = ramp(32, 96)
    assert (clip_evaluation(image, 32) == image[:, 32:64]).all()
    lefts = set()
    for seed in range(200):
        crop = clip_training(image, 32, np.random.default_rng(seed))
        lefts.add(next(left for left in range(65) if (crop == image[:, left : left + 32]).all()))
    assert {0, 64} <= lefts and len(lefts) > 50
    wide = clip_evaluation(ramp(60, 80), 30)
    assert wide[0, :, 0].max() < 5 and wide[-1, :, 0].min() > 250  # nothing of the short side is lost


def test_clip_takes_gray_and_transparent_pictures_as_rgb():
    colored = ramp(40, 60)
    gray = colored[..., 1:2]
    assert (clip_evaluation(gray, 32) == clip_evaluation(np.repeat(gray, 3, axis=-1), 32)).all()
    assert clip_training(gray, 32, np.random.default_rng(0)).shape == (32, 32, 3)
    opaque = np.concatenate([colored, np.full((40, 60, 1), 255, np.uint8)], axis=-1)
    assert (clip_evaluation(opaque, 32) == clip_evaluation(colored, 32)).all()


def test_the_center_square_of_a_picture_of_the_right_size_is_itself():
    image = ramp(32, 32)
    assert (center_square(image, 32, np.random.default_rng(0)) == image).all()


def test_the_center_square_is_central():
    image = ramp(32, 64)
    assert (center_square(image, 32, np.random.default_rng(0)) == image[:, 16:48]).all()


def test_only_the_first_stage_flips():
    flips = {name: set() for name in ("dvae", "dalle")}
    for seed in range(30):
        for name, transform in (("dvae", dvae_training), ("dalle", dalle_training)):
            picture = transform(ramp(48, 48), 32, np.random.default_rng(seed)).astype(int)
            flips[name].add(bool(picture[16, 0, 1] > picture[16, -1, 1]))
    assert flips["dvae"] == {True, False}
    assert flips["dalle"] == {False}


def places(height: int, width: int) -> np.ndarray:
    """A picture whose channels hold the row and the column of each pixel, twice; 0 to 255."""
    rows, columns = np.indices((height, width), dtype=np.uint8)
    return np.stack([2 * rows, 2 * columns, np.zeros_like(rows)], axis=-1)


def uniform(drawn: list[int], low: int, high: int) -> bool:
    """Whether numbers are spread evenly over low to high: chi-squared below its 99.9 % quantile, about."""
    counts = np.bincount(np.array(drawn) - low, minlength=high - low + 1)
    assert len(counts) == high - low + 1 and min(drawn) >= low
    expected = len(drawn) / len(counts)
    freedom = len(counts) - 1
    return bool(np.sum((counts - expected) ** 2 / expected) < freedom + 3.3 * np.sqrt(2 * freedom) + 5)


@pytest.fixture
def steps(monkeypatch):
    """Notes what a transform cuts and resizes: (shape before, side after), and the offsets of its squares."""
    noted = []
    resize = preprocess._resize

    def note(image, side):
        noted.append((int(image[0, 0, 0]) // 2, int(image[0, 0, 1]) // 2, len(image), side))
        return resize(image, side)

    monkeypatch.setattr(preprocess, "_resize", note)
    return noted


def test_the_first_stage_draws_squares_and_sizes_evenly(steps):
    pictures = [dvae_training(places(48, 60), 32, np.random.default_rng((7, index))) for index in range(2000)]
    tops, lefts, sides, sizes = (list(values) for values in zip(*steps, strict=True))
    assert set(tops) == {0} and set(sides) == {48}
    assert uniform(lefts, 0, 12)  # any full square of the picture
    assert uniform(sizes, 36, 48)  # 9/8 to 12/8 of 32
    # The crop of the resized square, where it was not resized and not mirrored: anywhere.
    plain = [p for p, size in zip(pictures, sizes, strict=True) if size == 48 and p[0, 1, 1] > p[0, 0, 1]]
    assert uniform([int(p[0, 0, 0]) // 2 for p in plain], 0, 16)
    mirrored = sum(bool(p[0, 1, 1] < p[0, -1, 1]) for p in pictures)
    assert 900 < mirrored < 1100


def test_the_second_stage_draws_squares_near_the_center_and_sizes_evenly(steps):
    for index in range(1000):
        dalle_training(places(40, 104), 32, np.random.default_rng((7, index)))
    tops, lefts, sides, sizes = (list(values) for values in zip(*steps, strict=True))
    assert set(tops) == {0} and set(sides) == {40}
    assert uniform(lefts, 24, 39)  # 3/8 to below 5/8 of 64 pixels of slack
    assert uniform(sizes, 32, 36)  # 1 to 9/8 of 32
    steps.clear()
    for index in range(100):
        dalle_training(places(45, 40), 32, np.random.default_rng((7, index)))
    assert {top for top, *_ in steps} == {1, 2} and {left for _, left, *_ in steps} == {0}
    steps.clear()
    dalle_training(places(40, 40), 32, np.random.default_rng(0))  # without slack there is one square
    assert steps[0][:3] == (0, 0, 40)


def test_neither_stage_enlarges_more_than_it_must(steps):
    for index in range(50):
        dvae_training(places(40, 50), 32, np.random.default_rng(index))
        dvae_training(places(34, 50), 32, np.random.default_rng(index))
        dalle_training(places(33, 50), 32, np.random.default_rng(index))
    sizes = {side: {size for *_, before, size in steps if before == side} for side in (40, 34, 33)}
    assert sizes == {40: {36, 37, 38, 39, 40}, 34: {34}, 33: {32, 33}}
    for transform in (dvae_training, dalle_training):
        assert transform(places(20, 50), 32, np.random.default_rng(0)).shape == (32, 32, 3)


def test_squares_shrink_by_averages_over_areas():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    halved = image.reshape(3, 2, 3, 2, 3).astype(float).mean((1, 3))
    assert (center_square(image, 3) == np.rint(halved)).all()
    line = np.repeat(np.array([0, 90, 240], np.uint8)[None, :, None], 3, axis=0)
    # Of three pixels, each of two areas covers one and a half.
    assert center_square(line, 2)[0, :, 0].tolist() == [(0 + 90 / 2) / 1.5, (90 / 2 + 240) / 1.5]
    even = np.full((97, 97, 1), 201, np.uint8)
    assert (center_square(even, 64) == 201).all()
    large = np.random.default_rng(1).integers(0, 256, (97, 97, 3), np.uint8)
    cover = np.array(
        [[max(0.0, min((i + 1) * 97 / 64, j + 1) - max(i * 97 / 64, j)) for j in range(97)] for i in range(64)]
    )
    exact = np.einsum("ij,jkc,lk->ilc", cover, large.astype(float), cover) / (97 / 64) ** 2
    assert np.abs(center_square(large, 64) - exact).max() <= 0.5 + 1e-4


def test_a_crop_has_the_shape_that_is_asked_for_and_loses_no_more_than_it_must():
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    means = image.reshape(12, 5, 20, 5, 3).astype(float).mean((1, 3))
    assert np.abs(center_crop(image, (12, 20)) - means).max() <= 0.5
    assert (center_crop(image, (60, 90)) == image[:, 5:95]).all()
    assert (center_crop(image, (48, 100)) == image[6:54]).all()
    places = set()
    for seed in range(200):
        crop = random_crop(image, (60, 90), np.random.default_rng(seed))
        places.add(next(left for left in range(11) if (crop == image[:, left : left + 90]).all()))
    assert places == set(range(11))
    assert center_crop(image, (120, 200)).shape == (120, 200, 3)  # a small picture is enlarged


def test_captions_are_chosen_among_all_and_the_first_without_chance():
    captions = ("one", "two", "three")
    assert choose_caption(captions, None) == 0
    assert {choose_caption(captions, np.random.default_rng(seed)) for seed in range(30)} == set(range(len(captions)))


def test_mistakes():
    with pytest.raises(UserError, match="center_square"):
        transform_pair("nope")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_pillow_s_image_is_seen_as_its_pixels(name):
    pair = transform_pair(name)
    for height, width in sizes_for(name):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        for size in (16, 32, 64):
            for function, seed in ((pair.training, 5), (pair.evaluation, 0)):
                seen = [
                    function(image, size, np.random.default_rng(seed)) for image in (pixels, Image.fromarray(pixels))
                ]
                assert (seen[0] == seen[1]).all()


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "celeba_training"])
def test_a_line_of_pixels_does_not_fill_the_memory(name):
    for shape in ((1, 60_000, 3), (60_000, 1, 3)):
        image = np.full(shape, 7, np.uint8)
        assert (transform_pair(name).training(image, 64, np.random.default_rng(0)) == 7).all()
