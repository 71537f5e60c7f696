"""Pictures in a labelled grid."""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_TEXT_SIZE = 12
_BACKGROUND, _INK = (250, 250, 248), (40, 40, 44)
_RIGHT, _WRONG = (70, 160, 90), (205, 70, 60)


def to_uint8(images: Float[np.ndarray, "*n h w c"]) -> UInt8[np.ndarray, "*n h w c"]:
    """Maps [-1, 1] to 0..255, rounded and clipped."""
    return np.clip(np.rint((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def draw_grid(
    images: UInt8[np.ndarray, "n h w c"],
    *,
    columns: int,
    labels: Sequence[str] | None = None,
    marks: Sequence[bool] | None = None,
    min_side: int = 128,
) -> Image.Image:
    """Draws pictures in reading order, each over its label.

    Args:
      images: RGB, or gray with one channel.
      columns: pictures in a row.
      labels: one line for each picture; long ones are wrapped under it.
      marks: whether each picture is right; its frame is then green, else red.
      min_side: small pictures are enlarged by a whole factor, without smoothing, to at least this many pixels.

    Raises:
      ValueError: if there are no pictures, or the labels are not as many.
    """
    if not len(images):
        raise ValueError("there are no pictures to draw")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(labels)} labels")
    factor = max(1, -(-min_side // images.shape[1]))
    pictures = [_enlarge(image, factor) for image in images]
    width, height = pictures[0].size
    font = ImageFont.load_default(_TEXT_SIZE)
    per_line = max(8, int(width / font.getlength("n")))
    texts = [textwrap.wrap(label, per_line) for label in labels] if labels is not None else []
    line_height = _TEXT_SIZE + 3
    text_height = max((len(lines) for lines in texts), default=0) * line_height
    rows = -(-len(pictures) // columns)
    cell = (width + _MARGIN, height + text_height + _MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        left, top = _MARGIN + number % columns * cell[0], _MARGIN + number // columns * cell[1]
        if marks is not None:
            frame = (left - 3, top - 3, left + width + 2, top + height + 2)
            pen.rectangle(frame, fill=_RIGHT if marks[number] else _WRONG)
        sheet.paste(picture, (left, top))
        for line, text in enumerate(texts[number] if texts else ()):
            pen.text((left, top + height + 1 + line * line_height), text, fill=_INK, font=font)
    return sheet


def _enlarge(image: UInt8[np.ndarray, "h w c"], factor: int) -> Image.Image:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
