"""Points: functions of their index alone, of the distribution that they are named after."""

import numpy as np
import pytest

from cli.errors import UserError
from data.points import DISTRIBUTIONS, PointStream


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_point_depends_on_its_index_alone(name):
    stream = PointStream(f"points/{name}", "train", seed=3)
    batch = stream.batch([5, 2000, 7])
    assert batch["point"].shape == (3, 2)
    assert batch["point"].dtype == np.float32
    assert batch["index"].tolist() == [5, 2000, 7]
    np.testing.assert_array_equal(PointStream(f"points/{name}", "train", seed=3)[2000]["point"], batch["point"][1])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_splits_and_seeds_differ(name):
    train = PointStream(f"points/{name}", "train", 0).batch(range(100))["point"]
    for other in (PointStream(f"points/{name}", "validation", 0), PointStream(f"points/{name}", "train", 1)):
        assert not np.any(np.all(other.batch(range(100))["point"] == train, axis=1))


def test_the_swiss_roll_is_a_spiral():
    x, y = PointStream("points/swiss_roll", "train", 0).batch(range(4000))["point"].T
    radius = np.hypot(x, y)
    turns = np.mod(np.arctan2(y, x), 2 * np.pi) / (2 * np.pi)
    # The radius grows by one turn's share of the angle: on each ray it is an arm's, or one turn further out.
    arm = 2 * np.pi / 7
    error = np.abs((radius / arm - turns + 0.5) % 1 - 0.5) * arm
    assert np.percentile(error, 99) < 0.2
    assert 0.8 < x.std() < 1.2
    assert 0.8 < y.std() < 1.2


def test_the_modes_and_squares_are_equally_likely():
    x, y = PointStream("points/eight_gaussians", "train", 0).batch(range(8000))["point"].T
    mode = np.round(np.arctan2(y, x) / (np.pi / 4)).astype(int) % 8
    assert np.abs(np.bincount(mode, minlength=8) - 1000).max() < 4 * 1000**0.5
    x, y = PointStream("points/checkerboard", "train", 0).batch(range(8000))["point"].T
    assert np.all((np.floor(x) + np.floor(y)) % 2 == 0)
    assert np.abs(np.histogram(x, bins=4, range=(-2, 2))[0] - 2000).max() < 4 * 2000**0.5


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("points/roll", "train", "unknown dataset 'points/roll'; choose points/ and one of swiss_roll"),
        ("points/swiss_roll", "test", "no split 'test'; it has train, validation"),
    ],
)
def test_what_is_not_there_is_refused(dataset, split, message):
    with pytest.raises(UserError, match=message):
        PointStream(dataset, split, 0)
