"""Do captions that a run writes say what pictures show? Graded exactly on the embedded dataset.

`written_captions` is of captions that are written for pictures of a split, or for its captions where the run reads
these alone; `agreement` of pairs that a run draws of nothing; `round_trip` of captions that are drawn, described and
drawn again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from data import scenes
from data.scenes.grader import SceneGrader, summarize
from evaluation.caption_accuracy import captioned_pictures, world_of
from evaluation.records import Record
from sample.sheets.grid import to_uint8
from sample.sheets.round_trip import take_legs
from sample.trained import TrainedSampler

WRITTEN, AGREEMENT, ROUND_TRIP = "written_captions", "agreement", "round_trip"
_LEGS = 3  # a picture of the caption, a caption of that, a picture of that


def written_values(trained: TrainedSampler, split: str, num: int, seed: int, settings: Mapping[str, Any]) -> Record:
    """Grades captions that are written for the first pictures of a split, or for their captions.

    Args:
      trained: reads pictures, or captions alone, and makes text.
      split: of its dataset.
      num: pictures.
      seed: of sampling.
      settings: of sampling.

    Returns:
      see `grade_captions`.

    Raises:
      UserError: for another dataset than the embedded one, or a split with fewer pictures.
    """
    pictures = captioned_pictures(trained.config, split, num)
    pictured = "image" in trained.sampler.reads
    rows = {"image": pictures.images} if pictured else trained.encode(pictures.captions)
    outputs = trained(rows, seed=seed, indices=range(num), **settings)
    return grade_captions(world_of(trained.config), trained.decode(outputs["text"]), pictures.images)


def agreement_values(trained: TrainedSampler, num: int, seed: int, settings: Mapping[str, Any]) -> Record:
    """Grades captions of pairs that are drawn of nothing, by the picture of each pair; arguments as above."""
    outputs = trained({}, seed=seed, indices=range(num), **settings)
    return grade_captions(world_of(trained.config), trained.decode(outputs["text"]), to_uint8(outputs["image"]))


def round_trip_values(trained: TrainedSampler, split: str, num: int, seed: int, settings: Mapping[str, Any]) -> Record:
    """What is left of captions after three legs, each of which reads what the one before it made.

    Arguments as of `written_values`, of a run that goes both ways.

    Returns:
      values: {"all": the share whose last picture shows all that the first caption says; "leg_1": whose first picture
      does; "leg_2": whose written caption can be read and says nothing else than the dataset's picture of the first
      shows}; counted.
    """
    pictures = captioned_pictures(trained.config, split, num)
    rows = trained.encode(pictures.captions)
    (first, _), (_, texts), (last, _) = take_legs(trained, rows, _LEGS, seed, range(num), settings)
    world = world_of(trained.config)
    drawn = [
        sum(score["all"] for score in SceneGrader(world).grade(pictures.captions, images)) / num
        for images in (first, last)
    ]
    written = grade_captions(world, texts, pictures.images)["values"]["all"]
    values = {"all": drawn[1], "leg_1": drawn[0], "leg_2": written}
    return {"values": values, "counted": dict.fromkeys(values, num)}


def grade_captions(world: scenes.World, texts: Sequence[str], images: UInt8[np.ndarray, "n h w 3"]) -> Record:
    """Compares captions with pictures.

    Args:
      world: of the pictures.
      texts: one for each.
      images: what they should say.

    Returns:
      values: {"all": the share of captions that can be read and name nothing that is not to be seen; "complete": that
      name every attribute besides; "readable": that can be read; and each attribute: of the readable captions that name
      it, the share that has it right}; counted.
    """
    readable, complete = [], []
    for place, text in enumerate(texts):
        try:
            complete.append(scenes.parse_caption(world, text).complete)
        except ValueError:
            continue
        readable.append(place)
    scores = SceneGrader(world).grade([texts[place] for place in readable], images[readable]) if readable else []
    right = [score["all"] for score in scores]
    totals = {name: total for name, total in (summarize(scores) if scores else {}).items() if name != "all"}
    values = {
        "all": sum(right) / len(texts),
        "complete": sum(a and b for a, b in zip(right, complete, strict=True)) / len(texts),
        "readable": len(readable) / len(texts),
        **{name: each / counted for name, (each, counted) in totals.items()},
    }
    counted = {name: totals[name][1] if name in totals else len(texts) for name in values}
    return {"values": values, "counted": counted}
