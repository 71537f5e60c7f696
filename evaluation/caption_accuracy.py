"""Do pictures show what captions say? Graded exactly on the embedded dataset."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from data import scenes
from data.records import open_records
from data.scenes.grader import SceneGrader, summarize


@dataclasses.dataclass(frozen=True)
class CaptionedPictures:
    """The first records of a split, each with one caption that names every attribute.

    Attributes:
      captions: n captions; paraphrases take turns.
      images: what they were written for.
    """

    captions: tuple[str, ...]
    images: UInt8[np.ndarray, "n h w 3"]


def world_of(config: ConfigDict) -> scenes.World:
    """The world of a run on the embedded dataset.

    Raises:
      UserError: for another dataset, which has no grader.
    """
    world = scenes.find_world(config.data.dataset)
    if world is None:
        raise UserError(f"captions of {config.data.dataset} cannot be graded; only those of scenes can")
    return world


def captioned_pictures(config: ConfigDict, split: str, num: int) -> CaptionedPictures:
    """Reads the first `num` records of a split.

    Raises:
      UserError: if the split has fewer records.
    """
    world = world_of(config)
    source = open_records(config.data, split)
    source.require(num)
    captions, images = [], []
    for index in range(num):
        record = source[index]
        complete = [text for text in record["captions"] if scenes.parse_caption(world, text).complete]
        captions.append(complete[index % len(complete)])
        images.append(record["image"])
    return CaptionedPictures(tuple(captions), np.stack(images))


@dataclasses.dataclass(frozen=True)
class CaptionAccuracy:
    """What came of drawing captions.

    Attributes:
      shares: of captions with all attributes right (`all`), and with each attribute right; where captions have one
        object and more, also of each number of objects with all attributes right (`all_1_object`, `all_2_objects`).
      counted: captions that each share is of: a caption that names no relation does not count for it.
      images: the pictures.
      scores: the grades of each.
    """

    shares: dict[str, float]
    counted: dict[str, int]
    images: UInt8[np.ndarray, "n h w 3"]
    scores: list[dict[str, bool]]


def caption_accuracy(
    config: ConfigDict,
    captions: Sequence[str],
    draw: Callable[[Sequence[str]], UInt8[np.ndarray, "n h w 3"]],
) -> CaptionAccuracy:
    """Draws captions and grades the pictures.

    Args:
      config: of the run.
      captions: what to draw.
      draw: the sampler, as a function of captions.
    """
    world, images = world_of(config), draw(captions)
    scores = SceneGrader(world).grade(captions, images)
    totals = summarize(scores)
    objects = [len(scenes.parse_caption(world, caption).objects) for caption in captions]
    numbers = sorted(set(objects))
    for number in numbers if len(numbers) > 1 else ():
        right = [score["all"] for score, count in zip(scores, objects, strict=True) if count == number]
        totals[f"all_{number}_object{'s' if number > 1 else ''}"] = sum(right), len(right)
    return CaptionAccuracy(
        shares={name: right / counted for name, (right, counted) in totals.items()},
        counted={name: counted for name, (_, counted) in totals.items()},
        images=images,
        scores=scores,
    )
