"""Pictures of any size as tiles of one size, which the vision adapter reads (Dubey et al. 2024, section 7.2).

A picture is laid on a canvas of whole tiles, resized without distortion and without enlarging it beyond one tile, its
right and lower rest black; then cut row by row. Canvases are numbered as `canvases` lists them, from 1 on.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image


class Tiles(NamedTuple):
    """A picture in tiles.

    Attributes:
      tiles: [T H W 3]; those that the canvas does not have are black.
      canvas: its number; the first rows x columns tiles are of the picture.
    """

    tiles: UInt8[np.ndarray, "t h w 3"]
    canvas: int


def canvases(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, columns) of at most so many tiles; the network lists them alike."""
    return tuple((rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1))


def choose_canvas(height: int, width: int, side: int, max_tiles: int) -> tuple[int, int]:
    """The canvas for a picture, (rows, columns).

    Of those that hold the picture as it is, the one on which it would be enlarged least; if there is none, the one on
    which it is made smaller least. Of equals the smallest, and the first.

    Args:
      height: of the picture, pixels, as the width.
      width: see there.
      side: of a tile.
      max_tiles: how many there may be.
    """

    def scale(canvas: tuple[int, int]) -> float:
        return min(canvas[0] * side / height, canvas[1] * side / width)

    choices = canvases(max_tiles)
    holding = [scale(canvas) for canvas in choices if scale(canvas) >= 1]
    best = min(holding) if holding else max(map(scale, choices))
    return min((canvas for canvas in choices if scale(canvas) == best), key=lambda canvas: canvas[0] * canvas[1])


def size_on_canvas(height: int, width: int, side: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """What a picture is resized to, (height, width): as large as the canvas allows, and no larger than it was.

    A picture smaller than a tile is enlarged to one. The longer side, by the share of the canvas, is met exactly; the
    other one is rounded down, to 1 at least.
    """
    tall, wide = (
        int(np.clip(extent, side, count * side)) for extent, count in zip((height, width), canvas, strict=True)
    )
    if wide / width < tall / height:
        return min(int(height * (wide / width)) or 1, tall), wide
    return tall, min(int(width * (tall / height)) or 1, wide)


def tile_picture(picture: UInt8[np.ndarray, "h w 3"], side: int, max_tiles: int) -> Tiles:
    """Cuts a picture, as `data.pictures.read_picture` has it, into tiles.

    Args:
      picture: RGB.
      side: of a tile, pixels.
      max_tiles: how many there may be, T.
    """
    height, width = picture.shape[:2]
    rows, columns = choose_canvas(height, width, side, max_tiles)
    tall, wide = size_on_canvas(height, width, side, (rows, columns))
    if (tall, wide) != (height, width):
        picture = np.asarray(Image.fromarray(picture).resize((wide, tall), Image.Resampling.BILINEAR))
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    canvas[:tall, :wide] = picture
    tiles = np.zeros((max_tiles, side, side, 3), np.uint8)
    cut = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    tiles[: rows * columns] = cut.reshape(-1, side, side, 3)
    return Tiles(tiles, canvases(max_tiles).index((rows, columns)) + 1)
