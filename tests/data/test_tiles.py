"""Pictures in tiles: published choices of canvas and size, black rests, and the order of tiles."""

import numpy as np
import pytest

from data.tiles import canvases, choose_canvas, size_on_canvas, tile_picture
from models.layers import tile_positions

# (width, height): number of the canvas, pixels of the picture on it; tiles of 560, four at most.
PUBLISHED = {
    (300, 800): (5, 240000),
    (2000, 600): (4, 1044960),
    (1000, 1000): (6, 1000000),
    (100, 100): (1, 313600),
    (561, 560): (2, 314160),
    (640, 480): (2, 307200),
    (1920, 1080): (6, 705600),
    (5000, 100): (4, 98560),
    (5000, 1): (4, 2240),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_canvases_and_sizes_are_the_published_ones(size):
    width, height = size
    canvas = choose_canvas(height, width, 560, 4)
    tall, wide = size_on_canvas(height, width, 560, canvas)
    assert (canvases(4).index(canvas) + 1, tall * wide) == PUBLISHED[size]


def test_canvases_are_those_of_the_network():
    for tiles in (1, 2, 4, 6):
        assert canvases(tiles) == tile_positions.canvases(tiles)


def test_a_picture_that_fits_is_cut_as_it_is_and_the_rest_is_black():
    picture = np.random.default_rng(0).integers(1, 256, (9, 14, 3), dtype=np.uint8)
    tiles, canvas = tile_picture(picture, 8, 4)
    assert canvases(4)[canvas - 1] == (2, 2)
    whole = np.concatenate([np.concatenate(tiles[:2], axis=1), np.concatenate(tiles[2:], axis=1)])
    np.testing.assert_array_equal(whole[:9, :14], picture)
    assert not whole[9:].any() and not whole[:, 14:].any()


def test_a_small_picture_fills_one_tile_and_a_long_one_a_row():
    picture = np.full((4, 4, 3), 7, np.uint8)
    tiles, canvas = tile_picture(picture, 8, 4)
    assert canvas == 1 and (tiles[0] == 7).all() and not tiles[1:].any()
    tiles, canvas = tile_picture(np.full((5, 400, 3), 7, np.uint8), 8, 4)
    assert canvases(4)[canvas - 1] == (1, 4) and (tiles[:, 0] == 7).all() and not tiles[:, 1:].any()
