"""The probe finds what is linear, its optimum is a stationary point, and it chooses its own strength."""

import numpy as np
import pytest
import scipy.special

from cli.errors import UserError
from evaluation.clip.linear_probe import choose_probe, fit_probe


def blobs(rng, n, spread):
    labels = rng.integers(0, 3, n)
    return np.eye(3)[labels] @ rng.normal(size=(3, 6)) * 0 + np.eye(3, 6)[labels] + rng.normal(
        size=(n, 6)
    ) * spread, labels


def test_the_solution_is_stationary():
    features, labels = blobs(np.random.default_rng(0), 200, 0.5)
    probe = fit_probe(features, labels, 3, strength=0.1)
    x = (features - probe.mean) / probe.scale
    p = scipy.special.softmax(x @ probe.weights + probe.bias, axis=1)
    slope = (p - np.eye(3)[labels]) / len(x)
    assert np.abs(x.T @ slope + 0.1 * probe.weights).max() < 1e-4
    assert np.abs(slope.sum(axis=0)).max() < 1e-4


def test_separable_classes_are_separated_and_noise_is_not():
    rng = np.random.default_rng(0)
    features, labels = blobs(rng, 300, 0.05)
    assert choose_probe(features, labels, 3).accuracy(*blobs(rng, 100, 0.05)) == 1
    noise = rng.normal(size=(300, 40))
    fresh = rng.normal(size=(300, 40)), rng.integers(0, 3, 300)
    probe = choose_probe(noise, rng.integers(0, 3, 300), 3)
    assert probe.accuracy(*fresh) < 0.45


def test_a_scale_of_the_features_changes_nothing():
    features, labels = blobs(np.random.default_rng(0), 200, 0.5)
    one, other = (fit_probe(features * factor + shift, labels, 3, 0.01) for factor, shift in ((1, 0), (1000, 5)))
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-4)


def test_few_and_noisy_examples_choose_a_stronger_penalty():
    rng = np.random.default_rng(2)
    features, labels = blobs(rng, 60, 1.0)
    features = np.concatenate([features, rng.normal(size=(60, 100))], axis=1)
    assert choose_probe(features, labels, 3).strength > 1e-3


def test_features_that_are_no_numbers_are_refused():
    features, labels = blobs(np.random.default_rng(0), 40, 0.5)
    probe, broken = (
        fit_probe(features, labels, 3, 0.1),
        np.where(np.arange(len(features))[:, None] < 3, np.nan, features),
    )
    for work in (lambda: fit_probe(broken, labels, 3, 0.1), lambda: probe.accuracy(broken, labels)):
        with pytest.raises(UserError, match="features are not finite"):
            work()
