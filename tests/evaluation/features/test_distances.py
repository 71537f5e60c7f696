"""Metrics of features against closed forms and against their definitions, written out without chunks."""

import numpy as np
import pytest

from evaluation.features import distances
from evaluation.features.distances import (
    FeatureStatistics,
    clip_mmd,
    feature_statistics,
    frechet_distance,
    inception_score,
    kernel_inception_distance,
    precision_recall,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that every sum here is over several of them, the last one shorter."""
    monkeypatch.setattr(distances, "_CHUNK", 7)


def draw(num: int, dimension: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num, dimension)) @ rng.normal(size=(dimension, dimension)) + shift).astype(np.float32)


def test_statistics_are_numpy_s():
    features = draw(50, 6, 0, 3.0)
    statistics = feature_statistics(features)
    np.testing.assert_allclose(statistics.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)
    assert statistics.num == 50


def test_statistics_keep_digits_far_from_the_origin():
    features = draw(50, 4, 0).astype(np.float64) + 1e6
    np.testing.assert_allclose(feature_statistics(features).covariance, np.cov(features, rowvar=False), rtol=1e-9)


def gaussian(mean, covariance) -> FeatureStatistics:
    return FeatureStatistics(np.asarray(mean, np.float64), np.asarray(covariance, np.float64), 1000)


def test_frechet_distance_of_known_gaussians():
    first = gaussian([0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    # Of commuting covariances: the squared distance of means, and of standard deviations.
    second = gaussian([1, 2, 3], np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 9 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In two dimensions tr (AB)^(1/2) = (tr AB + 2 (det A det B)^(1/2))^(1/2)."""
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(gaussian([0, 0], b), gaussian([0, 0], a)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_fewer_pictures_than_dimensions():
    """Both covariances are singular; their ranges are orthogonal, so the root is zero."""
    first, second = np.zeros((4, 20)), np.zeros((4, 20))
    first[:, :10], second[:, 10:] = draw(4, 10, 0), draw(4, 10, 1)
    one, other = feature_statistics(first), feature_statistics(second)
    expected = ((one.mean - other.mean) ** 2).sum() + np.trace(one.covariance) + np.trace(other.covariance)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6 * np.trace(one.covariance))


def mmd(x, y, kernel, biased):
    """The definition, pair by pair: an oracle without matrices of this project."""

    def mean(a, b, drop):
        pairs = [kernel(u, v) for i, u in enumerate(a) for j, v in enumerate(b) if not (drop and i == j)]
        return np.mean(pairs)

    x, y = x.astype(np.float64), y.astype(np.float64)
    return mean(x, x, not biased) + mean(y, y, not biased) - 2 * mean(x, y, False)


def test_kid_of_all_pictures_is_the_unbiased_mmd():
    x, y = draw(20, 5, 0), draw(30, 5, 1, 0.5)
    expected = mmd(x, y, lambda u, v: (u @ v / 5 + 1) ** 3, biased=False)
    result = kernel_inception_distance(x, y, subset_size=0)
    assert result.mean == pytest.approx(expected, rel=1e-10) and result.deviation == 0


def test_kid_of_subsets():
    x, y = draw(20, 5, 0), draw(30, 5, 1, 0.5)
    result = kernel_inception_distance(x, y, subsets=3, subset_size=8, seed=4)
    rng = np.random.RandomState(4)
    expected = []
    for _ in range(3):
        one, other = x[rng.choice(20, 8, replace=False)], y[rng.choice(30, 8, replace=False)]
        expected.append(mmd(one, other, lambda u, v: (u @ v / 5 + 1) ** 3, biased=False))
    assert result.mean == pytest.approx(np.mean(expected), rel=1e-10)
    assert result.deviation == pytest.approx(np.std(expected), rel=1e-10)
    assert result == kernel_inception_distance(x, y, subsets=3, subset_size=8, seed=4)
    assert result != kernel_inception_distance(x, y, subsets=3, subset_size=8, seed=5)


def test_kid_is_unbiased():
    """Two samples of one distribution: the mean over many is 0, where the biased estimate's is not."""
    samples = [np.random.default_rng(seed).normal(size=(20, 3)) for seed in range(400)]
    values = [kernel_inception_distance(s[:10], s[10:], subset_size=0).mean for s in samples]
    biased = [mmd(s[:10], s[10:], lambda u, v: (u @ v / 3 + 1) ** 3, biased=True) for s in samples[:20]]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20 and min(values) < 0
    assert np.mean(biased) > 10 * abs(np.mean(values))


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_cmmd_is_the_biased_mmd_with_a_wide_gaussian():
    x, y = unit(draw(20, 8, 0)), unit(draw(15, 8, 1, 0.5))
    expected = 1000 * mmd(x, y, lambda u, v: np.exp(-((u - v) ** 2).sum() / 200), biased=True)
    assert clip_mmd(x, y) == pytest.approx(expected, rel=1e-8)
    assert clip_mmd(x, x) == pytest.approx(0, abs=1e-9)
    # In float32 the three means, each near 1, would not have this many digits.
    assert expected / 1000 < 0.01


def test_inception_score_of_known_distributions():
    certain = np.eye(10, dtype=np.float32)[np.arange(100) % 10] * 1000
    result = inception_score(certain, splits=10, seed=None)
    assert result.mean == pytest.approx(10, rel=1e-9) and result.deviation == pytest.approx(0, abs=1e-9)
    assert inception_score(np.zeros((100, 10)), splits=10).mean == pytest.approx(1, rel=1e-9)
    one_class = np.tile(np.eye(10)[:1] * 1000, (50, 1))
    assert inception_score(one_class, splits=5).mean == pytest.approx(1, rel=1e-9)
    sorted_by_class = np.eye(10)[np.arange(100) // 10] * 1000
    assert inception_score(sorted_by_class, splits=10, seed=None).mean == pytest.approx(1, rel=1e-9)
    assert inception_score(sorted_by_class, splits=10, seed=2020).mean > 5


def test_inception_score_is_its_definition():
    logits = draw(23, 6, 0)
    scores = []
    for i in range(4):
        part = logits[i * 23 // 4 : (i + 1) * 23 // 4].astype(np.float64)
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp(np.mean([(row * np.log(row / p.mean(0))).sum() for row in p])))
    result = inception_score(logits, splits=4, seed=None)
    assert result.mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert result.deviation == pytest.approx(np.std(scores), rel=1e-10)  # of the population


def test_precision_and_recall_of_known_sets():
    """Real pictures in two clusters, generated ones in one of them and in nothing."""
    rng = np.random.default_rng(0)
    one, two, nowhere = (rng.normal(0, 0.1, (20, 4)) + center for center in (0.0, 50.0, 1000.0))
    real = np.concatenate([one, two])
    generated = np.concatenate([one + 0.01, one - 0.01, nowhere[:10]])
    precision, recall = precision_recall(generated, real)
    assert precision == pytest.approx(40 / 50) and recall == pytest.approx(20 / 40)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1e4) == (0.0, 0.0)


def test_precision_and_recall_are_their_definition():
    generated, real = draw(25, 3, 0).astype(np.float64), draw(18, 3, 1, 1.0).astype(np.float64)

    def share(points, centers, k):
        distances = np.linalg.norm(centers[:, None] - centers[None], axis=2)
        radii = np.sort(distances, axis=1)[:, k]
        return np.mean([(np.linalg.norm(centers - point, axis=1) <= radii).any() for point in points])

    for k in (1, 3, 5):
        expected = share(generated, real, k), share(real, generated, k)
        assert 0 < expected[0] < 1 and 0 < expected[1] < 1
        assert precision_recall(generated, real, neighbors=k) == pytest.approx(expected)


def test_copies_of_a_picture_are_at_no_distance():
    """Each picture is there twice, in another order: balls of radius 0, and rounding does not decide."""
    pictures = np.random.default_rng(0).uniform(0, 100, (8, 50))
    generated, real = np.repeat(pictures[::-1], 2, axis=0), np.repeat(pictures, 2, axis=0)
    assert precision_recall(generated, real, neighbors=1) == (1.0, 1.0)


def test_too_few_pictures_are_refused():
    few = draw(3, 4, 0)
    with pytest.raises(ValueError, match="two pictures"):
        feature_statistics(few[:1])
    with pytest.raises(ValueError, match="subsets of 1000"):
        kernel_inception_distance(few, few)
    with pytest.raises(ValueError, match="two pictures"):
        kernel_inception_distance(few[:1], few, subset_size=0)
    with pytest.raises(ValueError, match="10 splits"):
        inception_score(few)
    with pytest.raises(ValueError, match="no 3 neighbors"):
        precision_recall(few, draw(9, 4, 1))
