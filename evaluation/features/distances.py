"""How alike two sets of pictures are, from features of them: pure functions of arrays, in float64.

Every estimate depends on N, the number of pictures, and is given with it: the Frechet distance and the biased MMD are
too high by a term that falls as 1 / N, so that values at different N do not compare. Work is done in chunks; beside
the features of 50,000 pictures (0.4 GB as float32 [n 2048]), nothing larger than a few hundred MB is made.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import scipy.linalg
import scipy.special
from jaxtyping import Float

Features = Float[np.ndarray, "n d"]
Others = Float[np.ndarray, "m d"]

_CHUNK = 2048  # rows in float64 at a time


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of features, all that the Frechet distance needs.

    Attributes:
      mean: [d].
      covariance: [d d], with N - 1 in the denominator; of rank N - 1 at most.
      num: N, the number of pictures.
    """

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]
    num: int


@dataclasses.dataclass(frozen=True)
class MeanAndDeviation:
    """A mean over parts of the data with the population standard deviation (divided by their number) of the parts."""

    mean: float
    deviation: float


def feature_statistics(features: Features) -> FeatureStatistics:
    """Mean and covariance in two passes, each in float64.

    Raises:
      ValueError: if there are fewer than two pictures.
    """
    num = len(features)
    if num < 2:
        raise ValueError(f"a covariance needs two pictures or more, not {num}")
    mean = sum(chunk.sum(axis=0) for chunk in _chunks(features)) / num
    covariance = np.zeros((features.shape[1], features.shape[1]))
    for chunk in _chunks(features):
        centered = chunk - mean
        covariance += centered.T @ centered
    return FeatureStatistics(mean, covariance / (num - 1), num)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Frechet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Of Inception features it is the FID (Heusel et al. 2017, eq. 6). Units: squared features; 0 for equal Gaussians. It
    is too high by a term that falls as 1 / N.

    The root's trace is that of the symmetric (S1^(1/2) S2 S1^(1/2))^(1/2), which has the same eigenvalues and whose
    eigenvalues are real also where a covariance is singular (N <= d).
    """
    values, vectors = scipy.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ second.covariance @ root
    eigenvalues = scipy.linalg.eigvalsh((product + product.T) / 2)
    trace = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace)


def kernel_inception_distance(
    generated: Features, real: Others, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> MeanAndDeviation:
    """KID: the unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, "Demystifying MMD GANs").

    Unbiased at every N, so values slightly below 0 are right where sets are alike. Without unit.

    Args:
      generated: features of the model's pictures.
      real: features of the data.
      subsets: number of random subsets over which the estimate is averaged.
      subset_size: pictures of each side in a subset, without repetition; 0 for one estimate of all pictures, which
        draws nothing.
      seed: of the subsets. The generator is numpy's `RandomState`, whose sequence never changes; torch-fidelity draws
        the same subsets from the same seed.

    Raises:
      ValueError: if a side has fewer pictures than a subset, or than the two that an unbiased estimate needs.
    """
    if subset_size == 0:
        return MeanAndDeviation(_unbiased_mmd(generated, real), 0.0)
    smaller = min(len(generated), len(real))
    if subset_size > smaller or subsets < 1:
        raise ValueError(f"KID of {subsets} subsets of {subset_size} cannot be taken of {smaller} pictures")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        one = generated[rng.choice(len(generated), subset_size, replace=False)]
        other = real[rng.choice(len(real), subset_size, replace=False)]
        values.append(_unbiased_mmd(one, other))
    return MeanAndDeviation(float(np.mean(values)), float(np.std(values)))


def clip_mmd(generated: Features, real: Others, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CMMD: the squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)) (Jayasumana et al. 2024, "Rethinking FID").

    The biased estimate, diagonals kept, times `scale`: 0 for equal sets, otherwise too high by a term that falls as
    1 / N. Defined on L2-normalized embeddings of CLIP ViT-L/14 at 336 pixels. Unit vectors are close on the scale of
    sigma, so float32 would lose the third digit; this is float64.

    Args:
      generated: embeddings of the model's pictures.
      real: embeddings of the data.
      sigma: width of the kernel.
      scale: factor that makes values readable.
    """

    def mean_kernel(one: Features, other: Others) -> float:
        def kernel(x: Features, y: Others) -> Float[np.ndarray, "n m"]:
            return np.exp(-_squared_distances(x, y) / (2 * sigma**2))

        return sum(kernel(x, y).sum() for x in _chunks(one) for y in _chunks(other)) / (len(one) * len(other))

    value = mean_kernel(generated, generated) + mean_kernel(real, real) - 2 * mean_kernel(generated, real)
    return float(scale * value)


def inception_score(logits: Float[np.ndarray, "n v"], *, splits: int = 10, seed: int | None = 2020) -> MeanAndDeviation:
    """IS: exp of the mean Kullback-Leibler divergence of p(y|x) from p(y) (Salimans et al. 2016).

    Between 1 and the number of classes; too low at small N, where p(y) is estimated from few pictures.

    Args:
      logits: of a classifier; without the bias of its last layer by torch-fidelity's convention, which tables follow.
      splits: parts of the pictures, i N / splits to (i + 1) N / splits, each with its own p(y).
      seed: of the order of the pictures (numpy's `RandomState`, as torch-fidelity shuffles); None leaves it.

    Raises:
      ValueError: if a split would be empty.
    """
    num = len(logits)
    if not 1 <= splits <= num:
        raise ValueError(f"{num} pictures cannot be divided into {splits} splits")
    order = np.arange(num) if seed is None else np.random.RandomState(seed).permutation(num)
    scores = []
    for i in range(splits):
        part = logits[order[i * num // splits : (i + 1) * num // splits]].astype(np.float64)
        log_p = scipy.special.log_softmax(part, axis=1)
        log_marginal = scipy.special.logsumexp(log_p, axis=0) - np.log(len(part))
        scores.append(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(axis=1).mean()))
    return MeanAndDeviation(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(generated: Features, real: Others, *, neighbors: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2), shares from 0 to 1.

    Precision is the share of generated pictures within a real one's ball, recall the share of real ones within a
    generated one's; the ball of a picture reaches to its k-th nearest neighbor of its own kind. Both depend on N: the
    more pictures, the smaller the balls.

    Args:
      generated: features of the model's pictures (the paper: VGG-16's, 50,000 of each side).
      real: features of the data.
      neighbors: k.

    Raises:
      ValueError: if a side has no k-th neighbor.
    """
    if min(len(generated), len(real)) <= neighbors:
        raise ValueError(f"{min(len(generated), len(real))} pictures have no {neighbors} neighbors each")
    precision = _share_within(generated, real, _radii(real, neighbors))
    recall = _share_within(real, generated, _radii(generated, neighbors))
    return precision, recall


def _chunks(features: Features) -> Iterator[Features]:
    for start in range(0, len(features), _CHUNK):
        yield features[start : start + _CHUNK].astype(np.float64)


def _unbiased_mmd(one: Features, other: Others) -> float:
    """Squared MMD with KID's kernel: pairs of a picture with itself do not count, of which the cross term has none."""
    m, n = len(one), len(other)
    if min(m, n) < 2:
        raise ValueError(f"an unbiased estimate needs two pictures of each side or more, not {m} and {n}")

    def kernel_sum(first: Features, second: Others) -> float:
        return sum(((x @ y.T / x.shape[1] + 1) ** 3).sum() for x in _chunks(first) for y in _chunks(second))

    def diagonal_sum(features: Features) -> float:
        return sum((((x * x).sum(axis=1) / x.shape[1] + 1) ** 3).sum() for x in _chunks(features))

    within = (kernel_sum(one, one) - diagonal_sum(one)) / (m * (m - 1))
    within += (kernel_sum(other, other) - diagonal_sum(other)) / (n * (n - 1))
    return float(within - 2 * kernel_sum(one, other) / (m * n))


def _squared_distances(one: Features, other: Others) -> Float[np.ndarray, "n m"]:
    """|x - y|^2 of every pair; what is a rounding error of the products is 0, so that copies are at no distance."""
    squares = (one * one).sum(axis=1)[:, None] + (other * other).sum(axis=1)[None]
    distances = squares - 2 * one @ other.T
    return np.where(distances < 1e-13 * squares, 0, distances)


def _radii(features: Features, neighbors: int) -> Float[np.ndarray, " n"]:
    """Squared distance of each picture to its k-th nearest other one."""
    radii = []
    for chunk in _chunks(features):
        nearest = np.full((len(chunk), neighbors + 1), np.inf)  # the picture itself is one of them
        for others in _chunks(features):
            nearest = np.concatenate([nearest, _squared_distances(chunk, others)], axis=1)
            nearest = np.partition(nearest, neighbors, axis=1)[:, : neighbors + 1]
        radii.append(nearest.max(axis=1))
    return np.concatenate(radii)


def _share_within(points: Features, centers: Others, radii: Float[np.ndarray, " m"]) -> float:
    """Share of the points that lie in some center's ball."""
    within = 0
    for chunk in _chunks(points):
        inside = np.zeros(len(chunk), bool)
        for number, others in enumerate(_chunks(centers)):
            reach = radii[number * _CHUNK : number * _CHUNK + len(others)]
            inside |= (_squared_distances(chunk, others) <= reach[None]).any(axis=1)
        within += int(inside.sum())
    return within / len(points)
