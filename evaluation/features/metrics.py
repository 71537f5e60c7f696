"""Metrics that compare the features of a run's pictures with those of its dataset's.

A run that takes captions or classes draws those of a split's first records, one that takes neither draws as many
pictures, and a run that reconstructs passes the records' pictures through. The pictures compared with are the dataset's
own, the first records of the same split. Any dataset will do: nothing is graded. Pictures are measured as they are
drawn and not kept, so their number is bounded by their features alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from data.preprocess import transform_pair
from data.records import RecordSource, first_captions, first_classes, open_records
from evaluation.features import distances
from evaluation.features.extractors import Classifier, FeatureExtractor
from evaluation.features.reference import FeatureStore, dataset_provenance
from evaluation.records import Record
from sample.sheets.grid import to_uint8
from sample.trained import TrainedSampler

FEATURE_METRICS = ("fid", "kid", "cmmd", "inception_score", "precision_recall")

_SPLITS = 10  # of the Inception score
_NEIGHBORS = 3  # of precision and recall
_DRAWN_AT_ONCE = 64  # pictures read or measured together


@dataclasses.dataclass(frozen=True)
class FeatureSettings:
    """How features are made and compared.

    Attributes:
      extractor: measures pictures.
      store: keeps the dataset's features.
      num_real: pictures of the dataset; 0 for as many as are drawn.
      kid_subsets: see `distances.kernel_inception_distance`.
      kid_subset_size: pictures in each; 0 for one estimate of all.
    """

    extractor: FeatureExtractor
    store: FeatureStore
    num_real: int = 0
    kid_subsets: int = 100
    kid_subset_size: int = 1000


def check_feature_metrics(names: Sequence[str], num: int, settings: FeatureSettings | None) -> None:
    """Finds mistakes before hours are spent on drawing.

    Args:
      names: of metrics, of `FEATURE_METRICS`.
      num: pictures to draw.
      settings: None if the user gave no extractor.

    Raises:
      UserError: without an extractor, or if a metric is not defined on its features or not of so few pictures.
    """
    if not names:
        return
    if settings is None:
        raise UserError(
            f"{names[0]} compares features; give --features=inception:FILE, a file of the network's weights, "
            "or clip:RUN"
        )
    if "kid" in names and settings.kid_subset_size == 1:
        raise UserError(
            "kid has no estimate of one picture; --kid_subset_size must be at least 2, or 0 for one estimate of all"
        )
    kid = (settings.kid_subset_size or 2, "--kid_subset_size=0 makes one estimate of all pictures")
    least = {"fid": (2, ""), "kid": kid, "inception_score": (_SPLITS, ""), "precision_recall": (_NEIGHBORS + 1, "")}
    for name in names:
        if name not in settings.extractor.metrics:
            raise UserError(
                f"{name} is not defined on features of {settings.extractor.identity}, which are for "
                f"{', '.join(settings.extractor.metrics)}; give another --features"
            )
        fewest, hint = least.get(name, (1, ""))
        given = min(num, settings.num_real or num)
        if given < fewest:
            more = f"; {hint}" if hint else ""
            raise UserError(f"{name} needs {fewest} pictures of each side or more, not {given}; raise --num{more}")


def feature_makers(
    trained: TrainedSampler,
    names: Sequence[str],
    split: str,
    num: int,
    seed: int,
    sampling: Mapping[str, Any],
    settings: FeatureSettings,
) -> dict[str, Callable[[], Record]]:
    """Draws the pictures of one split, once for all metrics.

    Args:
      trained: the run.
      names: of metrics, checked by `check_feature_metrics`.
      split: of its dataset.
      num: pictures to draw.
      seed: of drawing.
      sampling: overrides of `config.sample`.
      settings: the rest.

    Returns:
      For each metric what computes it: values, and what they depend on beside the run and its sampling.

    Raises:
      UserError: if the split is missing or has fewer records, a record has no caption or class, or features are not
        finite.
    """
    num_real = settings.num_real or num
    source = open_records(trained.config.data, split, captions=False, fields=())
    source.require(num)
    source.require(num_real, "--num_real")

    pictures = draw_pictures(trained, split, num, seed, sampling)
    features, logits = _measure(settings.extractor, pictures, "inception_score" in names)
    compared = [name for name in names if name != "inception_score"]
    real = _real_features(trained, split, source, num_real, settings) if compared else features[:0]

    common = {"features": settings.extractor.identity, "resize": settings.extractor.resize, "num_generated": num}

    def compute(name: str) -> Record:
        sides = {"num_real": num_real} if name in compared else {}
        return {**common, **sides, **_values(name, features, logits, real, settings)}

    return {name: functools.partial(compute, name) for name in names}


def draw_pictures(
    trained: TrainedSampler, split: str, num: int, seed: int, sampling: Mapping[str, Any]
) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    """The run's pictures for the first `num` records: of their captions or classes, whatever it takes, or pictures.

    Raises:
      UserError: before any is drawn, if a record has no caption or class that the run takes.
    """
    data = trained.config.data
    if reconstructs(trained.sampler):
        source = open_records(data, split, captions=False, fields=())
        for indices in _chunks(num, trained.chunk):
            rows = {"image": _stored_pictures(source, indices, data)}
            yield to_uint8(trained(rows, seed=seed, indices=indices)["image"])
        return
    conditions = _conditions(trained, split, num)
    for indices in _chunks(num, trained.chunk):
        rows = {name: values[indices.start : indices.stop] for name, values in conditions.items()}
        yield to_uint8(trained(rows, seed=seed, indices=indices, **sampling)["image"])


def _chunks(num: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, num)) for start in range(0, num, size))


def reconstructs(sampler: Any) -> bool:
    """Whether a sampler makes pictures of pictures, and not of captions, classes or nothing."""
    return sampler.reads == ("image",) and "image" in sampler.makes


def _conditions(trained: TrainedSampler, split: str, num: int) -> dict[str, np.ndarray]:
    """What the first records say of what a run is told: their first captions, their classes, or nothing."""
    rows, data = {}, trained.config.data
    if "text" in trained.sampler.reads:
        rows |= trained.encode(first_captions(data, split, num))
    if "label" in trained.sampler.reads:
        rows["label"] = first_classes(data, split, num)
    return rows


def _real_features(
    trained: TrainedSampler, split: str, source: RecordSource, num: int, settings: FeatureSettings
) -> Float[np.ndarray, "n d"]:
    data = trained.config.data

    def compute() -> tuple[Float[np.ndarray, "n d"], bool]:
        pictures = (_stored_pictures(source, indices, data) for indices in _chunks(num, _DRAWN_AT_ONCE))
        # A record that could not be read was replaced by another one; the next evaluation may be able to read it.
        return _measure(settings.extractor, pictures, False)[0], not source.damaged

    cut = transform_pair(data.transform).evaluation.__name__
    provenance = dataset_provenance(data.dataset, data.data_dir, split, num, data.image_size, cut)
    return settings.store.get(provenance | {"features": settings.extractor.identity}, compute)


def _stored_pictures(source: RecordSource, indices: range, data: ConfigDict) -> UInt8[np.ndarray, "n h w 3"]:
    """The dataset's pictures, cut as they are in the run's own evaluation."""
    cut = transform_pair(data.transform).evaluation
    return np.stack([cut(source[index]["image"], data.image_size, None) for index in indices])


def _measure(
    extractor: FeatureExtractor, pictures: Iterator[UInt8[np.ndarray, "n h w 3"]], classify: bool
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n v"] | None]:
    if not classify:
        return _finite(extractor, np.concatenate([extractor.features(images) for images in pictures])), None
    if not isinstance(extractor, Classifier):
        raise TypeError(f"{extractor.identity} offers inception_score and has no logits")
    pairs = [extractor.features_and_logits(images) for images in pictures]
    features, logits = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return _finite(extractor, features), _finite(extractor, logits)


def _finite(extractor: FeatureExtractor, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Returns features of pictures; raises UserError if they are not finite, as no metric of them is a number."""
    broken = int(np.sum(~np.isfinite(features)))
    if broken:
        raise UserError(
            f"{broken} of {features.size} features of {extractor.identity} are not finite; its weights are damaged, "
            "give others as --features"
        )
    return features


def _values(
    name: str,
    generated: Float[np.ndarray, "n d"],
    logits: Float[np.ndarray, "n v"] | None,
    real: Float[np.ndarray, "m d"],
    settings: FeatureSettings,
) -> Record:
    """One metric's values, what shares are shares of, and settings of its own."""
    if name == "fid":
        statistics = (distances.feature_statistics(features) for features in (generated, real))
        return {"values": {"fid": distances.frechet_distance(*statistics)}, "counted": {}}
    if name == "kid":
        chosen = {"subsets": settings.kid_subsets, "subset_size": settings.kid_subset_size}
        kid = distances.kernel_inception_distance(generated, real, **chosen)
        return {**chosen, "values": {"kid": kid.mean, "kid_deviation": kid.deviation}, "counted": {}}
    if name == "cmmd":
        return {"values": {"cmmd": distances.clip_mmd(generated, real)}, "counted": {}}
    if name == "inception_score":
        score = distances.inception_score(logits, splits=_SPLITS)
        values = {"inception_score": score.mean, "inception_score_deviation": score.deviation}
        return {"inception_splits": _SPLITS, "values": values, "counted": {}}
    precision, recall = distances.precision_recall(generated, real, neighbors=_NEIGHBORS)
    counted = {"precision": len(generated), "recall": len(real)}
    return {"neighbors": _NEIGHBORS, "values": {"precision": precision, "recall": recall}, "counted": counted}
