"""Pictures in a labelled grid, and mosaics in a table."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from cli.errors import UserError

_MARGIN = 8
_GAP = 2  # between the pictures of a mosaic
_TEXT_SIZE = 12
_LINE = _TEXT_SIZE + 3
_ROW_HEADER = 150  # most pixels of a row's header
_BACKGROUND, _INK = (250, 250, 248), (40, 40, 44)
_MADE = (36, 88, 160)  # ink of texts that a run made
_RIGHT, _WRONG = (70, 160, 90), (205, 70, 60)


def to_uint8(images: Float[np.ndarray, "*n h w c"]) -> UInt8[np.ndarray, "*n h w c"]:
    """Maps [-1, 1] to 0..255, rounded and clipped.

    Raises:
      UserError: if a number is not finite; there is no color for it.
    """
    if not np.isfinite(images).all():
        raise UserError("pictures have numbers that are not finite; the weights that made them diverged or are damaged")
    return np.clip(np.rint((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


COLUMNS = 8  # most of a grid

Pictures = UInt8[np.ndarray, "n h w c"] | Sequence[UInt8[np.ndarray, "_ _ _"] | None]


def draw_grid(
    images: Pictures,
    *,
    columns: int,
    labels: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    marks: Sequence[bool] | None = None,
    min_side: int = 128,
) -> Image.Image:
    """Draws pictures in reading order, each over its label and its text.

    Args:
      images: RGB, or gray with one channel; of one size, or a list whose largest one sets the size of a place. None
        leaves one empty, but for label and text; where all are None, texts stand alone.
      columns: pictures in a row.
      labels: one line for each picture, what it was told; long ones are wrapped under it.
      texts: what was made for each, in another color under its label; "" for none.
      marks: whether each picture is right; its frame is then green, else red.
      min_side: small pictures are enlarged by a whole factor, without smoothing, to at least this many pixels.

    Raises:
      ValueError: if there are no pictures, or labels or texts are not as many.
    """
    if not len(images):
        raise ValueError("there are no pictures to draw")
    for name, lines in (("labels", labels), ("texts", texts)):
        if lines is not None and len(lines) != len(images):
            raise ValueError(f"{len(images)} pictures but {len(lines)} {name}")
    pictures = _enlarge_all(images, min_side)
    shown = [picture for picture in pictures if picture is not None]
    width = max((picture.width for picture in shown), default=2 * min_side)
    height = max((picture.height for picture in shown), default=0)
    font = ImageFont.load_default(_TEXT_SIZE)
    under = [
        [(line, ink) for lines, ink in ((labels, _INK), (texts, _MADE)) if lines for line in _wrap(lines[place], width)]
        for place in range(len(pictures))
    ]
    text_height = max(len(lines) for lines in under) * _LINE
    rows = -(-len(pictures) // columns)
    cell = (width + _MARGIN, height + text_height + _MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        left, top = _MARGIN + number % columns * cell[0], _MARGIN + number // columns * cell[1]
        if marks is not None:
            frame = (left - 3, top - 3, left + width + 2, top + height + 2)
            pen.rectangle(frame, fill=_RIGHT if marks[number] else _WRONG)
        if picture is not None:
            sheet.paste(picture, (left, top))
        for line, (text, ink) in enumerate(under[number]):
            pen.text((left, top + height + 1 + line * _LINE), text, fill=ink, font=font)
    return sheet


def behind_given(given: Sequence[Any], made: Sequence[Any], num: int, blank: Any) -> list[Any]:
    """What was given, each entry before the `num` that were made of it, in rows of `given_columns(num)`.

    Args:
      given: pictures, or what stands under them.
      made: `num` for each of these.
      num: how many.
      blank: fills the last row of each, so that the next one begins a row.
    """
    places: list[Any] = []
    for place, one in enumerate(given):
        places += [one, *made[place * num : (place + 1) * num], *[blank] * (-(1 + num) % given_columns(num))]
    return places


def beside_given(given: Sequence[Any], made: Sequence[Any], num: int, blank: Any) -> list[Any]:
    """What was given, each entry before the one that was made beside it, in rows of `pair_columns(num)`.

    Args:
      given: pictures, or what stands under them, as many as were made.
      made: `num` for each condition.
      num: how many.
      blank: fills the last row of each condition, so that the next one begins a row.
    """
    places: list[Any] = []
    for start in range(0, len(made), num):
        part = slice(start, start + num)
        places += [one for pair in zip(given[part], made[part], strict=True) for one in pair]
        places += [blank] * (-2 * num % pair_columns(num))
    return places


def pair_columns(num: int) -> int:
    """Columns of `num` pairs of what was given and what was made."""
    return min(2 * num, COLUMNS)


def side_by_side(pictures: UInt8[np.ndarray, "c *i h w 3"]) -> UInt8[np.ndarray, "c h w2 3"]:
    """One picture for each condition: of several that are shown together, these in a row."""
    return pictures if pictures.ndim == 4 else np.concatenate(list(pictures.swapaxes(0, 1)), axis=2)


def given_columns(num: int) -> int:
    """Columns where a picture that was given stands before `num` that were made of it."""
    return min(1 + num, COLUMNS)


def draw_mosaic(images: Pictures, *, columns: int, min_side: int = 64) -> Image.Image:
    """Draws pictures in reading order, close together and without labels: one cell of a table.

    Args:
      images: RGB, or gray with one channel, of one size; None leaves a place empty, but the first.
      columns: pictures in a row.
      min_side: small pictures are enlarged by a whole factor, without smoothing, to at least this many pixels.

    Raises:
      ValueError: if there is no first picture.
    """
    pictures = _enlarge_all(images, min_side)
    if not pictures or pictures[0] is None:
        raise ValueError("a mosaic begins with a picture")
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), _BACKGROUND)
    for number, picture in enumerate(pictures):
        if picture is None:
            continue
        sheet.paste(picture, (number % columns * (width + _GAP), number // columns * (height + _GAP)))
    return sheet


def draw_table(
    cells: Sequence[Sequence[Image.Image | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Draws rows of cells under the columns' headers, each beside its row's header; the largest sets a row's height.

    Args:
      cells: pictures; None leaves a place empty.
      rows: a header for each row; all "" leave no room for them.
      columns: a header for each column.
      title: of the whole; "" for none.

    Raises:
      ValueError: if there are no cells, or not as many as headers.
    """
    shown = [cell for row in cells for cell in row if cell is not None]
    if not shown or len(cells) != len(rows) or any(len(row) != len(columns) for row in cells):
        raise ValueError(f"{len(rows)} x {len(columns)} headers do not fit cells of {[len(row) for row in cells]}")
    width = max(cell.width for cell in shown)
    font = ImageFont.load_default(_TEXT_SIZE)
    longest = max(font.getlength(text) for text in rows)
    side = min(int(longest) + 1, _ROW_HEADER)
    beside = [_wrap(text, side) for text in rows]
    above = [_wrap(text, width) for text in columns]
    left = _MARGIN + (side + _MARGIN if longest else 0)
    full_width = left + len(columns) * (width + _MARGIN)
    heading = _wrap(title, full_width - 2 * _MARGIN)
    head = _MARGIN + len(heading) * _LINE + max(len(lines) for lines in above) * _LINE
    heights = [
        max(max((cell.height for cell in row if cell is not None), default=0), len(lines) * _LINE)
        for row, lines in zip(cells, beside, strict=True)
    ]
    sheet = Image.new("RGB", (full_width, head + sum(heights) + _MARGIN * len(heights)), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)

    def write(lines: Sequence[str], x: int, y: int) -> None:
        for line, text in enumerate(lines):
            pen.text((x, y + line * _LINE), text, fill=_INK, font=font)

    write(heading, _MARGIN, _MARGIN // 2)
    for column, lines in enumerate(above):
        write(lines, left + column * (width + _MARGIN), head - len(lines) * _LINE - 2)
    top = head
    for row, lines in enumerate(beside):
        write(lines, _MARGIN, top)
        for column, cell in enumerate(cells[row]):
            if cell is not None:
                sheet.paste(cell, (left + column * (width + _MARGIN), top))
        top += heights[row] + _MARGIN
    return sheet


def _wrap(text: str, width: int) -> list[str]:
    """Lines of about a width in pixels; none of an empty text."""
    font = ImageFont.load_default(_TEXT_SIZE)
    text = " ".join(text.splitlines())
    if text and font.getlength(text) <= width:
        return [text]
    return textwrap.wrap(text, max(8, int(width / font.getlength("n"))))


def _enlarge_all(images: Pictures, min_side: int) -> list[Image.Image | None]:
    return [None if image is None else _enlarge(image, min_side) for image in images]


def _enlarge(image: UInt8[np.ndarray, "h w c"], min_side: int) -> Image.Image:
    factor = max(1, -(-min_side // image.shape[0]))
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
