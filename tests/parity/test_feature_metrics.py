"""Metrics of the same features agree with torch-fidelity, clean-fid, pytorch-fid and torchmetrics.

The tolerance is that of float64: 1e-9 relative through eigenvalues of 32 x 32 products, 1e-10 of plain sums. Subsets of
KID and the order of the Inception score are drawn as torch-fidelity draws them, so its values are compared with both;
the other packages draw from unseeded generators, and are compared on one subset of all pictures.
"""

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid as clean_fid
from pytorch_fid import fid_score as pytorch_fid
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from evaluation.features.distances import (
    feature_statistics,
    frechet_distance,
    inception_score,
    kernel_inception_distance,
    precision_recall,
)

NUM, DIMENSION = 200, 32


@pytest.fixture(scope="module")
def features():
    """(generated, real), float64: non-negative as pooled activations are, of different covariances."""
    rng = np.random.default_rng(0)
    generated = np.maximum(rng.normal(0.3, 1, (NUM, DIMENSION)) @ rng.normal(size=(DIMENSION, DIMENSION)) / 4, 0)
    real = np.maximum(rng.normal(0.4, 1, (NUM, DIMENSION)) @ rng.normal(size=(DIMENSION, DIMENSION)) / 5, 0)
    return generated, real


@pytest.fixture(scope="module")
def tensors(features):
    return tuple(torch.from_numpy(array) for array in features)


@pytest.fixture(scope="module")
def fid(features):
    return frechet_distance(*(feature_statistics(array) for array in features))


class Features(torch.nn.Module):
    """Lets features through as if they were pictures."""

    num_features = DIMENSION

    def forward(self, x):
        return x


def test_fid_of_torch_fidelity(tensors, fid):
    statistics = [metric_fid.fid_features_to_statistics(tensor) for tensor in tensors]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert fid == pytest.approx(theirs, rel=1e-9) and fid > 0.1


def test_fid_of_clean_fid_and_pytorch_fid(features, fid, monkeypatch):
    def root_and_error(matrix, disp):
        """As both call it; SciPy 1.18 gives the root alone, and has no `disp`."""
        assert not disp
        return root(matrix), 0.0

    root = scipy.linalg.sqrtm
    monkeypatch.setattr(scipy.linalg, "sqrtm", root_and_error)
    assert fid == pytest.approx(clean_fid.fid_from_feats(*features), rel=1e-9)
    statistics = [value for array in features for value in (array.mean(axis=0), np.cov(array, rowvar=False))]
    assert fid == pytest.approx(pytorch_fid.calculate_frechet_distance(*statistics), rel=1e-9)


def test_fid_of_torchmetrics(tensors, fid):
    metric = FrechetInceptionDistance(feature=Features(), normalize=True).set_dtype(torch.float64)
    metric.update(tensors[1], real=True)
    metric.update(tensors[0], real=False)
    assert fid == pytest.approx(float(metric.compute()), rel=1e-9)


@pytest.mark.parametrize(("subsets", "size"), [(1, NUM), (7, 50)])
def test_kid_of_torch_fidelity(subsets, size, features, tensors):
    theirs = metric_kid.kid_features_to_metric(
        *tensors, kid_subsets=subsets, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    ours = kernel_inception_distance(*features, subsets=subsets, subset_size=size)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert ours.deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features")
def test_kid_of_all_pictures(features, tensors):
    ours = kernel_inception_distance(*features, subset_size=0).mean
    assert ours == pytest.approx(clean_fid.kernel_distance(*features, num_subsets=1, max_subset_size=NUM), rel=1e-10)
    metric = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=NUM, normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(tensors[1], real=True)
    metric.update(tensors[0], real=False)
    assert ours == pytest.approx(float(metric.compute()[0]), rel=1e-10)


@pytest.mark.parametrize("shuffle", [True, False])
def test_inception_score_of_torch_fidelity(shuffle):
    logits = np.random.default_rng(1).normal(0, 2, (103, 20))
    theirs = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=shuffle, rng_seed=2020)
    ours = inception_score(logits, splits=10, seed=2020 if shuffle else None)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert ours.deviation == pytest.approx(theirs["inception_score_std"], rel=1e-9)


@pytest.mark.parametrize("neighbors", [1, 3])
def test_precision_and_recall_of_torch_fidelity(neighbors, features, tensors):
    theirs = metric_prc.prc_features_to_metric(
        *tensors, prc_neighborhood=neighbors, prc_batch_size=64, save_cpu_ram=True, verbose=False
    )
    precision, recall = precision_recall(*features, neighbors=neighbors)
    assert 0.02 < precision < 0.98 and 0.02 < recall < 0.98 and precision != recall
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
