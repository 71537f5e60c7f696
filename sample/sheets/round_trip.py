"""A prompt to its picture, that to its caption, and on: what survives is what both directions agree on."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cli.errors import UserError
from sample.command import Drawn
from sample.conditions import Order, order_rows
from sample.sheets.grid import draw_grid, to_uint8
from sample.trained import TrainedSampler, refuse_idle

Leg = tuple[UInt8[np.ndarray, "n h w 3"], None] | tuple[None, list[str]]


def take_legs(
    trained: TrainedSampler,
    rows: dict[str, np.ndarray],
    legs: int,
    seed: int,
    indices: Sequence[int],
    settings: Mapping[str, Any],
) -> Iterator[Leg]:
    """What each leg makes of what the one before it made.

    Args:
      trained: draws pictures of captions and writes captions of pictures.
      rows: what begins, "text" [n l] or "image" [n h w 3].
      legs: how often the side changes.
      seed: of the first leg; each further one adds 1.
      indices: of the n rows, for their keys.
      settings: of sampling.

    Yields:
      (pictures, None) or (None, captions), in turn.
    """
    assert trained.tokenizer is not None  # of a run that reads captions
    for leg in range(legs):
        outputs = trained(rows, seed=seed + leg, indices=indices, **settings)
        if "text" in rows:
            images = to_uint8(outputs["image"])
            rows = {"image": images}
            yield images, None
        else:
            texts = trained.decode(outputs["text"])
            # Also one that says nothing, which nobody would give as a prompt.
            ids = [trained.tokenizer.encode(text, trained.config.data.text_length).ids for text in texts]
            rows = {"text": np.stack(ids)}
            yield None, texts


def draw_round_trip(trained: TrainedSampler, order: Order, num: int, legs: int) -> Drawn:
    """Strips of a prompt or a picture and what is made of it in turn, a row each.

    Unlike a variation, each leg reads what the one before wrote: pixels, or words. Leg k is drawn with seed s + k.

    Args:
      trained: draws pictures of captions and writes captions of pictures.
      order: what begins: prompts, or pictures.
      num: trips from each.
      legs: how often the side changes.

    Returns:
      what the last leg made; records also hold the captions on the way.

    Raises:
      UserError: if the run does not go both ways, what begins is no prompt and no picture, a picture is to be changed,
        or a setting has no effect on any leg.
    """
    sides, sampler = {"text", "image"}, trained.sampler
    if not (sides <= set(sampler.reads) and sides <= set(sampler.makes)) or trained.tokenizer is None:
        raise UserError(f"{trained.run.folder} does not draw captions and describe pictures; leave out --round_trip")
    if legs < 1 or len(order.rows) != 1 or order.rows[0] not in sides:
        raise UserError("a round trip has 1 leg at least, and begins with --prompt or --image, one of the two")
    if "strength" in order.settings:
        raise UserError("a round trip describes its pictures and changes none; leave --strength out")
    if order.settings.get("mode"):
        raise UserError("a round trip goes from one side to the other; leave --mode out")
    order = dataclasses.replace(order, settings={**order.settings, **trained.inferred})
    rows = {name: np.repeat(value, num, axis=0) for name, value in order_rows(trained, order).items()}
    (begins_with,) = order.rows
    calls = [((side,), order.settings) for side in (begins_with, *(sides - {begins_with}))[:legs]]
    idle = trained.idle(*calls)
    refuse_idle(idle, order.settings)
    count, indices = len(order.conditions) * num, list(range(num)) * len(order.conditions)
    records = [{**record, "captions": []} for record in order.records(num)]
    begins = [str(condition) for condition in order.conditions for _ in range(num)]
    columns: list[tuple[Any, list[str]]] = [(rows.get("image"), begins)]
    images, texts = None, None
    for images, texts in take_legs(trained, rows, legs, order.seed, indices, order.settings):
        for record, text in zip(records, texts or (), strict=texts is not None):
            record["captions"].append(text)
        columns.append((images, list(texts or [""] * count)))
    cells = [
        (None if pictures is None else pictures[row], words[row]) for row in range(count) for pictures, words in columns
    ]
    told = [words if place % len(columns) == 0 else "" for place, (_, words) in enumerate(cells)]
    made = ["" if place % len(columns) == 0 else words for place, (_, words) in enumerate(cells)]
    grid = draw_grid([picture for picture, _ in cells], columns=len(columns), labels=told, texts=made)
    settings = {**order.describe(trained, idle), "round_trip": legs}
    return Drawn(images, texts, records, settings, grid)
