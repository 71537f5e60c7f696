"""Samples over a grid of settings and conditions: labelled pages, and a row of numbers for each cell."""

import csv
import dataclasses
import io
import itertools
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cli.errors import UserError
from cli.locations import Location, in_store, write_whole
from data.scenes import find_world, parse_caption
from data.scenes.grader import SceneGrader
from sample.conditions import (
    Condition,
    Made,
    Order,
    draw,
    find_sources,
    given_pictures,
    order_rows,
    record_sources,
    refuse_unread,
)
from sample.embedding import ClipEmbedder
from sample.files import Samples, write_picture
from sample.sheets.axes import TEXTS, Axis, spell
from sample.sheets.grid import (
    COLUMNS,
    behind_given,
    beside_given,
    draw_grid,
    draw_mosaic,
    draw_table,
    given_columns,
    pair_columns,
)
from sample.trained import Rows, TrainedSampler

TABLE = "sweep.csv"
MEASURES = ("seconds", "pictures", "pictures_per_second", "accuracy", "clip_score", "diversity")
_ONE_ROW = 8  # cells of a single axis in a row; more stand in a column


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of values.

    Attributes:
      values: of each axis, by its name.
      order: what is drawn.
      rows: what the sampler is told.
      sources: see `sample.conditions.find_sources`.
    """

    values: dict[str, Any]
    order: Order
    rows: Rows
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sweep(Samples):
    """All samples of a sweep.

    Attributes:
      pages: the files of the grid.
      table: the file of numbers.
    """

    pages: tuple[Location, ...]
    table: Location


def check_axes(trained: TrainedSampler, axes: Sequence[Axis]) -> None:
    """Raises UserError if a run makes nothing that a table can show, or an axis is a setting that it does not have."""
    if not {"image", "text"} & set(trained.sampler.makes):
        makes = " and ".join(trained.sampler.makes)
        raise UserError(f"{trained.run.folder} makes {makes}, and --sweep draws pictures and text; leave it out")
    known = trained.setting_names
    for axis in axes:
        if axis.name not in (*known, *TEXTS, "seed", "label"):
            has = f"it has {', '.join(known)}" if known else "it has no settings"
            raise UserError(f"--sweep {axis.name}: {trained.run.folder} has no such setting; {has}")


def run_sweep(
    trained: TrainedSampler,
    order: Order,
    axes: Sequence[Axis],
    num: int,
    out: Location,
    clip: ClipEmbedder | None = None,
) -> Sweep:
    """Draws every cell, with the same seed and indices in each, and writes pages and numbers as they are done.

    Args:
      trained: the run that draws.
      order: what the axes do not change.
      axes: rows of a page, columns of a page, and what differs between pages; one axis alone is a row of up to 8 cells,
        or else a column.
      num: samples of each condition in a cell.
      out: the grid's file; further axes put their values into the names of pages (`Axis.file_part`). `TABLE` stands
        beside it.
      clip: scores the pictures, if there is one.

    Raises:
      UserError: if a cell is impossible, or a setting has an effect in none, before any is drawn, or a file cannot be
        written.
    """
    check_axes(trained, axes)
    cells = make_cells(trained, order, axes)
    measure = Measure(trained, cells, clip)
    table = out.with_name(TABLE)
    names = [axis.name for axis in axes]
    per_page = math.prod(len(axis.values) for axis in axes[:2])
    done, records, pages, page = [], [], [], []
    warm: set[Hashable] = set()
    texts = ("texts",) if "text" in trained.sampler.makes else ()
    append_row(table, (*names, *MEASURES, *texts), new=True)
    for number, cell in enumerate(cells):
        made, seconds = _timed(trained, cell, num, warm)
        measured = measure(cell.order, made, num, seconds)
        said = [" | ".join(made.texts or ())] if texts else []
        append_row(table, [*map(spell, cell.values.values()), *map(spell_measure, measured.values()), *said])
        title = ", ".join(f"{name}={spell(value)}" for name, value in cell.values.items())
        print(f"cell {number + 1} of {len(cells)}: {title}: {seconds:.2f} s", flush=True)
        done.append(made)
        records += [{**cell.values, **record, **record_sources(cell.sources)} for record in cell.order.records(num)]
        page.append(_draw_cell(cell, made, num))
        if len(page) == per_page:
            name, heading = _page_name(out, axes, number // per_page), _page_title(cell, axes)
            write_picture(name, _draw_page(page, axes[:2], heading))
            pages.append(name)
            page = []
    idle = trained.idle(*(cell.order.call for cell in cells))
    settings = {**order.describe(trained, idle), "sweep": {axis.name: list(axis.values) for axis in axes}}
    settings = {name: value for name, value in settings.items() if name not in names}
    # Cells of several modes may make different things: each record has those of its own cell.
    counts = [num * len(cell.order.conditions) for cell in cells]
    both = list(zip(done, counts, strict=True))
    images = [one for made, count in both for one in ([None] * count if made.images is None else made.images)]
    said = tuple(one for made, count in both for one in ([None] * count if made.texts is None else made.texts))
    made = tuple(None if all(one is None for one in many) else many for many in (images, said))
    return Sweep(made[0], made[1], records, settings, tuple(pages), table)


def make_cells(trained: TrainedSampler, order: Order, axes: Sequence[Axis]) -> list[Cell]:
    """All cells, those of a page together, row by row; each is checked.

    Raises:
      UserError: if a cell is impossible, or a setting has an effect in none.
    """
    cells = []
    known: dict[Hashable, Rows] = {}  # captions are encoded once
    for page in itertools.product(*(axis.values for axis in axes[2:])):
        for place in itertools.product(*(axis.values for axis in axes[:2])):
            values = dict(zip([axis.name for axis in axes], (*place, *page), strict=True))
            cell = vary(order, values)
            told = (cell.conditions, cell.negative_prompt)
            if told not in known:
                known[told] = order_rows(trained, cell)
            trained.sampler.request(**known[told], **cell.settings)
            cells.append(Cell(values, cell, known[told], find_sources(trained, cell, known[told])))
    refuse_unread(trained, *(cell.order for cell in cells))
    return cells


def vary(order: Order, values: Mapping[str, Any]) -> Order:
    """An order with some of its values changed: prompt, label, image, seed, negative_prompt, or settings."""
    told = {field.name: values[field.name] for field in dataclasses.fields(Condition) if field.name in values}
    # Conditions that differed in nothing else are now one.
    conditions = tuple(dict.fromkeys(dataclasses.replace(condition, **told) for condition in order.conditions))
    fields, settings = {"conditions": conditions}, dict(order.settings)
    for name, value in values.items():
        if name in told:
            continue
        if name in ("seed", "negative_prompt"):
            fields[name] = value
        else:
            settings[name] = value
    return dataclasses.replace(order, settings=settings, **fields)


class Measure:
    """What is measured of a cell, in the order of `MEASURES`; None where it does not apply.

    accuracy: share of pictures that have every attribute right which their caption names (embedded dataset).
    clip_score: 100 max(mean cosine, 0), as torchmetrics has it, of pictures with their captions.
    diversity: see `diversity`.
    pictures, pictures_per_second: samples of the cell (of a run of text: texts), and these by `seconds`; a sampler
      draws whole chunks (`sample.trained.CHUNK`), so that few pictures take as long as a chunk.

    Args:
      trained: the run.
      cells: all of a sweep.
      clip: a trained CLIP, or None.
    """

    def __init__(self, trained: TrainedSampler, cells: Sequence[Cell], clip: ClipEmbedder | None):
        self._clip = clip
        self._grader: SceneGrader | None = None
        self._unread: set[str] = set()
        captions = {caption for cell in cells for caption in cell.order.captions()}
        if "image" not in trained.sampler.makes:
            captions = set()
        if clip is not None and not captions:
            raise UserError(f"{trained.run.folder} draws no captions, and --clip compares with these; leave it out")
        world = find_world(trained.config.data.dataset)
        if world is None or trained.picture_size != world.image_size or not captions:
            return
        self._grader = SceneGrader(world)
        for caption in sorted(captions):
            try:
                parse_caption(world, caption)
            except ValueError as error:
                self._unread.add(caption)
                print(f"warning: no accuracy for {caption!r}, which the grader cannot read: {error}", flush=True)

    def __call__(self, order: Order, made: Made, num: int, seconds: float) -> dict[str, Any]:
        """Measures the samples of a cell, those of a condition together."""
        images, count, captions = made.images, num * len(order.conditions), order.captions(num)
        accuracy = score = None
        if images is not None and self._grader is not None and not self._unread & set(captions):
            accuracy = float(np.mean([grade["all"] for grade in self._grader.grade(captions, images)]))
        if images is not None and self._clip is not None:
            score = 100 * max(float(np.mean(self._clip.cosines(images, captions))), 0.0)
        values = (
            *(seconds, count, count / seconds),
            *(accuracy, score, None if images is None else diversity(images.reshape(-1, num, *images.shape[1:]))),
        )
        return dict(zip(MEASURES, values, strict=True))


def diversity(images: UInt8[np.ndarray, "c n h w ch"]) -> float | None:
    """How different pictures of one condition are.

    The mean of sqrt(mean over pixels and channels of (a - b)^2), a and b in [0, 1], over all pairs of each condition:
    0 where all are the same, about 0.41 for two pictures of uniform noise; None where there are no pairs.
    """
    pictures = images.astype(np.float32) / 255
    distances = [
        float(np.sqrt(np.mean(np.square(first - second))))
        for group in pictures
        for first, second in itertools.combinations(group, 2)
    ]
    return float(np.mean(distances)) if distances else None


def append_row(table: Location, row: Sequence[Any], new: bool = False) -> None:
    """Adds a row to a CSV file, or begins the file.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        line = io.StringIO(newline="")
        csv.writer(line).writerow(row)
        if in_store(table):  # where nothing is appended
            write_whole(table, (b"" if new else table.read_bytes()) + line.getvalue().encode("utf-8"))
            return
        with table.open("w" if new else "a", newline="", encoding="utf-8") as file:
            file.write(line.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {table}: {error}; give --out a folder that can be written") from error


def spell_measure(value: Any) -> str:
    """A number with six digits; nothing for None."""
    return "" if value is None else f"{value:.6g}"


def mosaic_columns(conditions: int, num: int) -> int:
    """Pictures in a row of a cell: each condition has a row, but a single one is nearly a square."""
    return min(num, COLUMNS) if conditions > 1 and num > 1 else math.ceil(math.sqrt(conditions * num))


def _timed(trained: TrainedSampler, cell: Cell, num: int, warm: set[Hashable]) -> tuple[Made, float]:
    """Samples of a cell and the seconds that it took; a new program is compiled before, by drawing one sample."""
    program = trained.program(cell.rows, **cell.order.settings)
    if program not in warm:
        first = dataclasses.replace(cell.order, conditions=cell.order.conditions[:1])
        draw(trained, first, {name: value[:1] for name, value in cell.rows.items()}, 1)
        warm.add(program)
    start = time.perf_counter()
    made = draw(trained, cell.order, cell.rows, num)
    return made, time.perf_counter() - start


def _draw_cell(cell: Cell, made: Made, num: int) -> Image.Image:
    """The samples of a cell: a mosaic of pictures, each picture that was given before its own, or texts under them."""
    count, told = len(cell.order.conditions), given_pictures(cell.rows)
    columns = mosaic_columns(count, num)
    images = made.images
    if made.texts is None and images is not None:
        if told is None:
            return draw_mosaic(images, columns=columns)
        return draw_mosaic(behind_given(list(told), list(images), num, None), columns=given_columns(num))
    if images is not None and told is not None and made.texts is not None and cell.sources.get("text") == "given":
        pictures = beside_given(list(np.repeat(told, num, axis=0)), list(images), num, None)
        texts = beside_given(made.texts, [""] * len(made.texts), num, "")
        return draw_grid(pictures, columns=pair_columns(num), texts=texts, min_side=64)
    if images is None and told is not None:
        images = np.repeat(told, num, axis=0)
    pictures = [None] * len(made.texts or ()) if images is None else list(images)
    return draw_grid(pictures, columns=columns, texts=made.texts, min_side=64)


def _draw_page(page: Sequence[Image.Image], axes: Sequence[Axis], title: str) -> Image.Image:
    """The table of one page, whose cells come row by row."""
    headers = [[axis.header(place) for place in range(len(axis.values))] for axis in axes]
    if len(headers) == 1:
        headers = [[""], headers[0]] if len(page) <= _ONE_ROW else [headers[0], [""]]
    rows, columns = headers
    cells = [page[start : start + len(columns)] for start in range(0, len(page), len(columns))]
    return draw_table(cells, rows=rows, columns=columns, title=title)


def _page_places(axes: Sequence[Axis], number: int) -> list[int]:
    """Which value each further axis has on a page."""
    sizes = [len(axis.values) for axis in axes[2:]]
    return [int(place) for place in np.unravel_index(number, sizes)] if sizes else []


def _page_name(out: Location, axes: Sequence[Axis], number: int) -> Location:
    places = zip(axes[2:], _page_places(axes, number), strict=True)
    return out.with_name("_".join([out.stem, *(axis.file_part(place) for axis, place in places)]) + out.suffix)


def _page_title(cell: Cell, axes: Sequence[Axis]) -> str:
    """The values that a page fixes, and what its conditions hold unless it is in its headers."""
    fixed = [axis.header(axis.values.index(cell.values[axis.name])) for axis in axes[2:]]
    swept = dict.fromkeys({axis.name for axis in axes} & {field.name for field in dataclasses.fields(Condition)})
    fixed.append(" / ".join(str(dataclasses.replace(condition, **swept)) for condition in cell.order.conditions))
    if cell.order.negative_prompt is not None and "negative_prompt" not in (axis.name for axis in axes):
        fixed.append(f"negative_prompt={cell.order.negative_prompt}")
    return ", ".join(text for text in fixed if text)
