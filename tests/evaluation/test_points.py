"""The distance between sets of points, against what is known of it."""

import math

import numpy as np
import pytest
import scipy.stats

from evaluation.points import energy_distance


def test_the_energy_distance_of_shifted_gaussians():
    # In one dimension, N(0, 1) and N(m, 1): E|X - Y| of N(m, 2) is known.
    m, x = 0.8, scipy.stats.norm.ppf((np.arange(2000) + 0.5) / 2000)[:, None]  # evenly, so without noise
    folded = 2 / math.sqrt(math.pi) * math.exp(-m * m / 4) + m * math.erf(m / 2)
    expected = 2 * folded - 2 * 2 / math.sqrt(math.pi)
    assert energy_distance(x, x + m) == pytest.approx(expected, abs=0.002)


def test_equal_distributions_are_at_no_distance():
    rng = np.random.default_rng(0)
    distances = [energy_distance(rng.normal(size=(300, 2)), rng.normal(size=(200, 2))) for _ in range(30)]
    assert abs(np.mean(distances)) < 3 * np.std(distances) / 30**0.5
    assert min(distances) < 0  # without bias
