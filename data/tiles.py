"""Pictures of any size as tiles of one size, which the vision adapter reads (Dubey et al. 2024, section 7.2).

A picture is laid on a canvas of whole tiles, resized without distortion and without enlarging it beyond one tile, its
right and lower rest black; then cut row by row. Canvases are numbered as `canvases` lists them, from 1 on.

`picture_fields` is where training, `--image` and evaluation prepare a picture, in tiles or as a transform has it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from data.buckets import Shape
from data.pictures import BACKGROUND
from data.preprocess import PictureTransform, Source


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


def tile_picture(picture: Source, side: int, max_tiles: int) -> Tiles:
    """Cuts a picture, as `data.pictures` reads it, into tiles.

    Args:
      picture: RGB, pixels or Pillow's image of them.
      side: of a tile, pixels.
      max_tiles: how many there may be, T.
    """
    drawn = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    rows, columns = choose_canvas(drawn.height, drawn.width, side, max_tiles)
    tall, wide = size_on_canvas(drawn.height, drawn.width, side, (rows, columns))
    if (wide, tall) != drawn.size:
        drawn = drawn.resize((wide, tall), Image.Resampling.BILINEAR)
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    canvas[:tall, :wide] = np.asarray(drawn)
    tiles = np.zeros((max_tiles, side, side, 3), np.uint8)
    cut = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    tiles[: rows * columns] = cut.reshape(-1, side, side, 3)
    return Tiles(tiles, canvases(max_tiles).index((rows, columns)) + 1)


def picture_fields(
    image: Source,
    size: int | Shape,
    transform: PictureTransform,
    max_tiles: int = 1,
    rng: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """What an example or a request holds of a picture: static shapes, whatever its own.

    Args:
      image: of any size.
      size: of the result, height and width or the side of a square; with tiles that of a tile.
      transform: what happens to a picture that is not cut into tiles.
      max_tiles: T, `config.data.max_tiles`; 1 for no tiles.
      rng: of the transform.

    Returns:
      {"image": [h w c]}, or in tiles {"image": [T h w 3], "canvas": int32 []}, which tells how many tiles there are.
    """
    if max_tiles == 1:
        return {"image": transform(image, size, rng)}
    if not isinstance(size, int):
        raise ValueError(f"tiles are squares, not of {size}")
    tiles, canvas = tile_picture(image, size, max_tiles)
    return {"image": tiles, "canvas": np.asarray(canvas, np.int32)}


def show_tiles(tiles: UInt8[np.ndarray, "*b t h w 3"], canvas: Int[np.ndarray, "*b"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """Pictures for people to see: each canvas made as small as a tile, beside it white where it is no square.

    Args:
      tiles: of each picture.
      canvas: the number of each; 0 for no picture.
    """
    most, side = tiles.shape[-4], tiles.shape[-2]
    shown = np.full((canvas.size, side, side, 3), BACKGROUND, np.uint8)
    for place, number in enumerate(canvas.ravel().tolist()):
        if number:
            rows, columns = canvases(most)[number - 1]
            cut = tiles.reshape(-1, *tiles.shape[-4:])[place, : rows * columns]
            whole = cut.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
            tall, wide = (side * count // max(rows, columns) for count in (rows, columns))
            small = Image.fromarray(whole).resize((wide, tall), Image.Resampling.BILINEAR)
            shown[place, :tall, :wide] = np.asarray(small)
    return shown.reshape(*canvas.shape, side, side, 3)
