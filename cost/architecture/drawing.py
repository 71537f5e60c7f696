"""A plain drawing of boxes, text and arrows as SVG: text whose width is known, since its letters are of one width."""

import dataclasses
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

LETTER = 0.61  # width of a letter over its size, of the monospaced fonts that there are
LINE = 1.35  # height of a line over the size of its letters
Number = int | float
INK, FAINT = "#26262a", "#6a6a72"


@dataclasses.dataclass(frozen=True)
class Text:
    """A line of text.

    Attributes:
      x, y: of its left end, on the base line.
      words: what it says.
      size: of its letters, in pixels.
      color: of its letters.
      bold: whether they are.
    """

    x: Number
    y: Number
    words: str
    size: Number = 11
    color: str = INK
    bold: bool = False

    @property
    def extent(self) -> tuple[Number, Number, Number, Number]:
        """Left, top, right, bottom."""
        return self.x, self.y - 0.8 * self.size, self.x + width_of(self.words, self.size), self.y + 0.25 * self.size


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """A box with round corners; a dashed one with `dash`."""

    x: Number
    y: Number
    width: Number
    height: Number
    fill: str
    stroke: str
    round: Number = 6
    dash: bool = False


@dataclasses.dataclass(frozen=True)
class Arrow:
    """A line through points, with a head at its end."""

    points: tuple[tuple[Number, Number], ...]
    color: str = FAINT


def width_of(words: str, size: Number) -> Number:
    """Width of a line in pixels."""
    return len(words) * size * LETTER


def write_svg(width: Number, height: Number, shapes: Sequence[Text | Rectangle | Arrow], title: str) -> str:
    """The text of an SVG file; equal shapes give equal text.

    Args:
      width: in pixels.
      height: in pixels.
      shapes: drawn in order, the later ones over the others.
      title: what readers of the picture are told.
    """
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#fbfbf9"/>',
    ]
    return "\n".join([*lines, *map(_element, shapes), "</svg>", ""])


def _element(shape: Text | Rectangle | Arrow) -> str:
    if isinstance(shape, Text):
        weight = ' font-weight="bold"' if shape.bold else ""
        place = f'x="{shape.x:g}" y="{shape.y:g}" font-size="{shape.size:g}" fill={quoteattr(shape.color)}'
        return f'<text {place}{weight} xml:space="preserve">{escape(shape.words)}</text>'
    if isinstance(shape, Rectangle):
        dash = ' stroke-dasharray="6 4"' if shape.dash else ""
        return (
            f'<rect x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:g}" height="{shape.height:g}" '
            f'rx="{shape.round:g}" fill={quoteattr(shape.fill)} stroke={quoteattr(shape.stroke)}{dash}/>'
        )
    path = " L ".join(f"{x:g} {y:g}" for x, y in shape.points)
    (x0, y0), (x, y) = shape.points[-2:]
    length = max(1e-9, ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5)
    a, b = (x - x0) / length, (y - y0) / length  # the direction in which it ends
    head = ((x, y), (x - 7 * a - 3.5 * b, y - 7 * b + 3.5 * a), (x - 7 * a + 3.5 * b, y - 7 * b - 3.5 * a))
    corners = " ".join(f"{u:g},{v:g}" for u, v in head)
    color = quoteattr(shape.color)
    return (
        f'<path d="M {path}" fill="none" stroke={color} stroke-width="1.3"/><polygon points="{corners}" fill={color}/>'
    )
