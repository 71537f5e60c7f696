"""What `python -m sample` draws."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cli.errors import UserError
from sample.conditions import (
    Made,
    Order,
    draw,
    find_sources,
    given_pictures,
    order_rows,
    record_sources,
    refuse_unread,
    write_out,
)
from sample.embedding import ClipEmbedder
from sample.files import Samples
from sample.sheets.grid import COLUMNS, behind_given, beside_given, draw_grid, given_columns, pair_columns
from sample.sheets.points import draw_point_run
from sample.trained import TrainedSampler

_SHOWN = ("image", "text", "point")  # of what samplers make


@dataclasses.dataclass(frozen=True)
class Drawn(Samples):
    """What was made, with a labelled grid.

    Attributes:
      picture: the grid.
    """

    picture: Image.Image


def check_shown(trained: TrainedSampler) -> None:
    """Raises UserError if what the run makes is nothing that people look at."""
    makes = trained.sampler.makes
    if not set(makes) & set(_SHOWN):
        hint = "; give it to --rerank, or to python -m evaluation" if "features" in makes else ""
        raise UserError(f"{trained.run.folder} makes {' and '.join(makes)}, which nothing can show{hint}")


def draw_samples(
    trained: TrainedSampler, order: Order, num: int, clip: ClipEmbedder | None = None, keep: int = 0
) -> Drawn:
    """Makes `num` samples of each condition, a row of the grid each (several rows beyond eight).

    A condition's picture stands before the pictures that are made of it, or over the texts that are; where there are
    both, before each of the pictures, over its own text. A text that is made of a picture never stands under another.
    Texts are printed, a single one as it comes.

    Args:
      trained: the run that draws.
      order: what.
      num: samples of each condition.
      clip: chooses among the pictures of a prompt, if there is one (Ramesh et al. 2021, section 2.6).
      keep: how many it keeps of each prompt, best first; 0 for all.

    Raises:
      UserError: if the run does not read such conditions, a prompt is empty, or a setting is impossible or has no
        effect.
    """
    rows, count = order_rows(trained, order), len(order.conditions)
    refuse_unread(trained, order)
    if clip is not None and (order.conditions[0].prompt is None or "image" not in trained.sampler.makes):
        raise UserError(f"{trained.run.folder} draws no captions, and --rerank compares with these; leave it out")
    if count == num == 1 and trained.sampler.makes == ("text",) and hasattr(trained.sampler, "stream"):
        made = write_out(trained, order, rows, lambda part: print(part, end="", flush=True))
    else:
        made = draw(trained, order, rows, num)
        if made.images is None:  # what was said is read here, too
            print("\n".join(made.texts or ()))
    sources = find_sources(trained, order, rows)
    records = [{**record, **record_sources(sources)} for record in order.records(num)]
    pictured = "image" in rows and made.images is not None
    unnamed = "reconstruction" if trained.sampler.reads == ("image",) else "variation"
    labels = [
        str(dataclasses.replace(condition, image=None)) or unnamed if pictured else str(condition)
        for condition in order.conditions
        for _ in range(num)
    ]
    description, shown = order.describe(trained), num
    if clip is not None and made.images is not None:
        shown = keep or num
        cosines = clip.cosines(made.images, order.captions(num)).reshape(count, num)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :shown]  # of equals, the one drawn first
        kept = (best + num * np.arange(count)[:, None]).ravel().tolist()
        made = made.take(kept)
        records = [{**records[place], "clip_cosine": float(cosines.ravel()[place])} for place in kept]
        labels = [f"{labels[place]} [{cosines.ravel()[place]:.3f}]" for place in kept]
        description |= {
            "rerank": str(clip.trained.run.folder),
            "rerank_step": clip.trained.weights.step,
            "candidates": num,
        }
    grid = draw_made(order, made, labels, shown, given_pictures(rows), sources)
    return Drawn(made.images, made.texts, records, description, grid)


def draw_figure(trained: TrainedSampler, order: Order, num: int) -> Drawn:
    """One picture of what a diffusion of points does; see `sample.sheets.points.draw_point_run`.

    Raises:
      UserError: if the run does not read such conditions, or a setting is impossible.
    """
    order_rows(trained, order)
    refuse_unread(trained, order)
    figure = draw_point_run(trained, num, order.seed, order.settings)
    return Drawn(np.asarray(figure)[None], None, [{"points": num}], order.describe(trained), figure)


def draw_made(
    order: Order,
    made: Made,
    labels: Sequence[str],
    num: int,
    told: UInt8[np.ndarray, "c h w 3"] | None,
    sources: Mapping[str, str],
) -> Image.Image:
    """The grid of `num` samples of each condition.

    Args:
      order: what was to be made.
      made: the samples.
      labels: of each.
      num: of each condition.
      told: the picture of each condition, if they hold one.
      sources: see `sample.conditions.find_sources`; {} of a run without such.
    """
    count, texts = len(order.conditions), made.texts
    columns = min(num, COLUMNS) if num > 1 else min(count, COLUMNS)
    if made.images is None:
        images = [None] * len(labels) if told is None else list(np.repeat(told, num, axis=0))
        return draw_grid(images, columns=columns, labels=labels if any(labels) else None, texts=texts)
    if told is None:
        return draw_grid(made.images, columns=columns, labels=labels if any(labels) else None, texts=texts)
    given = [str(dataclasses.replace(condition, prompt=None, label=None)) for condition in order.conditions]
    if texts is not None and sources.get("text") == "given":
        repeated = [place for place in range(count) for _ in range(num)]
        images = beside_given([told[place] for place in repeated], list(made.images), num, None)
        names = beside_given([given[place] for place in repeated], labels, num, "")
        under = beside_given(texts, [""] * len(texts), num, "")
        return draw_grid(images, columns=pair_columns(num), labels=names, texts=under)
    images = behind_given(list(told), list(made.images), num, None)
    names = behind_given(given, labels, num, "")
    under = behind_given([""] * count, texts or [""] * len(labels), num, "")
    return draw_grid(images, columns=given_columns(num), labels=names, texts=under)
