"""What a trained CLIP knows of a dataset: classes by description, pictures by caption, attributes by a linear probe.

On the embedded dataset the classes are its attributes; any other one needs a field of class numbers, or only captions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from cli.errors import UserError
from cli.plurals import spell_count
from data.preprocess import transform_pair
from data.records import CAPTIONS, open_records
from data.scenes import Scene, World, find_world, parse_caption
from evaluation.clip.linear_probe import choose_probe
from evaluation.clip.retrieval import match_captions, retrieval_metrics
from evaluation.clip.scene_prompts import (
    OBJECT_ATTRIBUTES,
    alternatives,
    attribute_values,
    captions_of,
    class_prompts,
    scene_label,
    scene_of,
)
from evaluation.clip.similarity import draw_similarity
from evaluation.clip.zero_shot import DEFAULT_TEMPLATES, Embed, class_embeddings, fill_templates, top_accuracy
from evaluation.records import Record, keep_picture
from sample.embedding import BLOCK, ClipEmbedder
from sample.trained import TrainedSampler

CLIP_METRICS = ("zero_shot", "retrieval", "linear_probe", "similarity")
SHOWN = 12  # pairs in the matrix


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """What is to be told apart, and how.

    Attributes:
      label: the dataset's field of class numbers; the embedded dataset has attributes in its place.
      classes: names of the classes, in order; () for the dataset's own.
      templates: prompts with `{}` for a class's name.
      num_train: pictures of the training split that a linear probe is fitted on.
    """

    label: str = "label"
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    num_train: int = 5000


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The first records of a split.

    Attributes:
      features: of the pictures, of unit length.
      shown: the first few pictures, as evaluation sees them.
      captions: all that each has, but blank ones.
      labels: field -> class numbers; on the embedded dataset, attribute -> values' numbers, -1 where there are two
        objects.
      names: field -> names of its classes.
      world: of the embedded dataset; else None.
      scenes: what each picture of it shows.
    """

    features: Float[np.ndarray, "n e"]
    shown: UInt8[np.ndarray, "m h w 3"]
    captions: tuple[tuple[str, ...], ...]
    labels: dict[str, Int[np.ndarray, " n"]]
    names: dict[str, tuple[str, ...]]
    world: World | None = None
    scenes: tuple[Scene, ...] = ()


def default_metrics(trained: TrainedSampler, split: str, settings: ClipSettings) -> tuple[str, ...]:
    """What is computed unless a user names metrics: of a split without classes or captions, nothing that needs them."""
    data = trained.config.data
    source = open_records(data, split)
    classes = find_world(data.dataset) is not None or settings.label in source.class_names
    return (("zero_shot",) if classes else ()) + (("retrieval", "similarity") if source.has_captions else ())


def read_pictures(clip: ClipEmbedder, split: str, num: int) -> Pictures:
    """Reads the first `num` records of a split of the run's dataset, and embeds their pictures.

    Raises:
      UserError: if it has fewer.
    """
    data = clip.trained.config.data
    source = open_records(data, split)
    source.require(num)
    transform = transform_pair(data.transform).evaluation
    records: list[dict[str, Any]] = []
    features: list[Float[np.ndarray, "b e"]] = []
    shown: list[UInt8[np.ndarray, "h w 3"]] = []
    for start in range(0, num, BLOCK):  # all pictures of a large split would not fit in memory
        block = [source[index] for index in range(start, min(start + BLOCK, num))]
        images = [transform(record.pop("image"), data.image_size, None) for record in block]
        features.append(clip.images(images))
        shown += images[: SHOWN - len(shown)]
        records += block
    captions = tuple(record.get(CAPTIONS, ()) for record in records)
    pictures = np.concatenate(features), np.stack(shown), captions
    world = find_world(data.dataset)
    if world is None:
        names = source.class_names
        labels = {name: np.array([int(record[name]) for record in records]) for name in names}
        return Pictures(*pictures, labels, names)
    scenes = tuple(scene_of(record, world) for record in records)
    names = {name: values for name, values in attribute_values(world).items() if name != "relation"}
    labels = {name: np.array([scene_label(world, scene, name) for scene in scenes]) for name in names}
    return Pictures(*pictures, labels, names, world, scenes)


def clip_makers(
    trained: TrainedSampler, split: str, num: int, settings: ClipSettings
) -> dict[str, Callable[[], Record]]:
    """Embeds the pictures of one split, for all metrics.

    Args:
      trained: a run of the objective "clip".
      split: of its dataset.
      num: pictures, the first of it.
      settings: classes and templates.

    Returns:
      For each of `CLIP_METRICS` what computes it: values, how many pictures each share is of, and settings; it raises
      UserError if there are no captions or no such classes, as the metric needs.

    Raises:
      UserError: if the split has fewer.
    """
    clip = ClipEmbedder(trained)
    pictures = read_pictures(clip, split, num)
    return {
        "zero_shot": lambda: _zero_shot(pictures, clip.texts, settings),
        "retrieval": lambda: _retrieval(trained, pictures, clip.texts),
        "linear_probe": lambda: _linear_probe(clip, pictures, settings),
        "similarity": lambda: _similarity(trained, pictures, clip.texts, split),
    }


def _zero_shot(pictures: Pictures, embed: Embed, settings: ClipSettings) -> Record:
    """Classifies; on the embedded dataset each attribute in turn."""
    world, features = pictures.world, pictures.features
    if world is not None:
        values, counted = {}, {}
        for attribute, labels in pictures.labels.items():
            single = labels >= 0
            if single.any():
                classes = class_embeddings(embed, class_prompts(world, attribute))
                values[attribute] = top_accuracy(features[single], classes, labels[single], top=(1,))["top_1"]
                counted[attribute] = int(single.sum())
        pairs = _pair_accuracy(world, pictures, embed)
        values |= {name: right / total for name, (right, total) in pairs.items()}
        counted |= {name: total for name, (_, total) in pairs.items()}
        return {"values": values, "counted": counted}
    labels, names = _classes(pictures, settings)
    known = labels >= 0  # hidden labels, of a test split, are -1
    if not known.any():
        raise UserError(f"no picture of this split has a class in the field {settings.label}; choose another split")
    classes = class_embeddings(embed, fill_templates(names, settings.templates))
    values = top_accuracy(features[known], classes, labels[known])
    return {
        "values": values,
        "counted": dict.fromkeys(values, int(known.sum())),
        "label": settings.label,
        "classes": list(settings.classes) or len(names),
        "templates": list(settings.templates),
    }


def _pair_accuracy(world: World, pictures: Pictures, embed: Embed) -> dict[str, tuple[int, int]]:
    """Two objects: is the true caption nearer than those with one attribute changed? (right, counted) by attribute."""
    places = [place for place, scene in enumerate(pictures.scenes) if len(scene.objects) == 2]
    right: dict[str, list[bool]] = {}
    for attribute in attribute_values(world) if places else ():
        objects = (0, 1) if attribute in OBJECT_ATTRIBUTES else (0,)
        cases = [
            (place, alternatives(world, pictures.scenes[place], attribute, k)) for place in places for k in objects
        ]
        texts = embed([text for _, scenes in cases for text in captions_of(world, scenes)])
        bounds = np.cumsum([len(scenes) for _, scenes in cases])[:-1]
        for (place, _), candidates in zip(cases, np.split(texts, bounds), strict=True):
            similarity = candidates @ pictures.features[place]
            name = attribute if attribute == "relation" else f"pair_{attribute}"
            right.setdefault(name, []).append(bool(np.all(similarity[0] > similarity[1:])))
    return {name: (sum(hits), len(hits)) for name, hits in right.items()}


def _retrieval(trained: TrainedSampler, pictures: Pictures, embed: Embed) -> Record:
    """Pictures by caption and captions by picture, among pictures that their captions tell apart."""
    captions = pictures.captions
    _require_captions(trained, captions)
    world = pictures.world
    if world is not None:
        captions = tuple(tuple(t for t in texts if parse_caption(world, t).complete) for texts in captions)
        meanings: Sequence[Any] = pictures.scenes
    else:
        meanings = captions
    kept = list({meaning: place for place, meaning in reversed(list(enumerate(meanings)))}.values())[::-1]
    texts, own = match_captions([captions[place] for place in kept])
    values = retrieval_metrics(pictures.features[kept], embed(texts), own)
    shares = [name for name in values if not name.endswith("rank")]
    counted = {name: len(texts) if name.startswith("text") else len(kept) for name in shares}
    return {"values": values, "counted": counted, "pictures": len(kept), "captions": len(texts)}


def _linear_probe(clip: ClipEmbedder, pictures: Pictures, settings: ClipSettings) -> Record:
    """Fits a probe for each label on the training split, and counts what it gets right on this one."""
    data = clip.trained.config.data
    records = len(open_records(data, data.split))
    train = read_pictures(clip, data.split, min(settings.num_train, records))
    values, counted, strengths = {}, {}, {}
    for name in (settings.label,) if pictures.world is None else pictures.names:
        if name not in pictures.names:
            raise UserError(_no_label(pictures, name))
        fit, check = train.labels[name] >= 0, pictures.labels[name] >= 0
        if fit.sum() > 1 and check.any():
            probe = choose_probe(train.features[fit], train.labels[name][fit], len(pictures.names[name]))
            values[name] = probe.accuracy(pictures.features[check], pictures.labels[name][check])
            counted[name], strengths[name] = int(check.sum()), probe.strength
    about = {"train_split": data.split, "num_train": len(train.captions), "strength": strengths}
    return {"values": values, "counted": counted, **about, **({} if pictures.world else {"label": settings.label})}


def _similarity(trained: TrainedSampler, pictures: Pictures, embed: Embed, split: str) -> Record:
    """Draws the cosines of the first pictures and captions; the values are means of own pairs and of others."""
    _require_captions(trained, pictures.captions[:SHOWN])
    captions = [texts[0] for texts in pictures.captions[:SHOWN]]
    cosines = embed(captions) @ pictures.features[:SHOWN].T
    keep_picture(trained, f"similarity_{split}", draw_similarity(pictures.shown, captions, cosines))
    own = np.eye(len(cosines), dtype=bool)
    values = {"own_cosine": float(cosines[own].mean())}
    if len(cosines) > 1:
        values["other_cosine"] = float(cosines[~own].mean())
    return {"values": values, "pictures": len(cosines)}


def _require_captions(trained: TrainedSampler, captions: Sequence[tuple[str, ...]]) -> None:
    """Raises UserError unless each picture has one."""
    without = [place for place, texts in enumerate(captions) if not texts]
    if without:
        raise UserError(
            f"record {without[0]} of {trained.config.data.dataset} has no caption ({len(without)} have none); "
            "choose a metric that needs no captions"
        )


def _classes(pictures: Pictures, settings: ClipSettings) -> tuple[Int[np.ndarray, " n"], tuple[str, ...]]:
    """Labels and the names of their classes."""
    if settings.label not in pictures.names:
        raise UserError(_no_label(pictures, settings.label))
    names = settings.classes or pictures.names[settings.label]
    if len(names) != len(pictures.names[settings.label]):
        raise UserError(
            f"--classes names {spell_count(len(names), 'class', 'classes')}, and the field {settings.label} has "
            f"{len(pictures.names[settings.label])}; write one a line, in their order"
        )
    return pictures.labels[settings.label], names


def _no_label(pictures: Pictures, label: str) -> str:
    has = f"it has {', '.join(pictures.names)}" if pictures.names else "it has none"
    return f"the dataset has no field {label!r} of class numbers ({has}); give --label"
