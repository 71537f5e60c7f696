"""Crops, resizes and flips."""

import numpy as np
import pytest

from cli.errors import UserError
from data.preprocess import (
    TRANSFORMS,
    adm_evaluation,
    celeba_evaluation,
    center_square,
    choose_caption,
    clip_evaluation,
    clip_training,
    dalle_training,
    dvae_training,
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
    assert pair.evaluation in (center_square, clip_evaluation, celeba_evaluation, adm_evaluation)


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


def test_the_second_stage_stays_near_the_center():
    lows = [dalle_training(ramp(32, 96), 32, np.random.default_rng(seed))[0, :, 1].min() for seed in range(40)]
    # The square's offset is between 3/8 and 5/8 of the 64 pixels of slack: columns 24 to 40 of 96.
    assert min(lows) >= 255 * 23 / 95 and max(lows) <= 255 * 46 / 95
    assert len(set(lows)) > 3


def test_captions_are_chosen_among_all_and_the_first_without_chance():
    captions = ("one", "two", "three")
    assert choose_caption(captions, None) == "one"
    assert {choose_caption(captions, np.random.default_rng(seed)) for seed in range(30)} == set(captions)


def test_mistakes():
    with pytest.raises(UserError, match="center_square"):
        transform_pair("nope")
