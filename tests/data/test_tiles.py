"""Pictures in tiles: published choices of canvas and size, black rests, and the order of tiles."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.config import load_config
from cli.errors import UserError
from data import folder
from data.pictures import read_picture
from data.pipeline import ExampleStream, batch_spec
from data.tiles import canvases, choose_canvas, show_tiles, size_on_canvas, tile_picture
from models.layers import tile_positions
from train.checks import check_config
from train.unread import unread_keys

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


CONFIG = f"--config={Path(__file__).resolve().parents[2]}/configs/paper/vision_adapter.py:debug"


@pytest.mark.parametrize("cache", [False, True])
def test_examples_of_pictures_of_any_shape_have_one_shape(tmp_path, cache):
    (tmp_path / "pictures").mkdir()
    for index, size in enumerate(((90, 20), (20, 90), (40, 40))):
        noise = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text("a picture")
    request = folder.Request("shapes", str(tmp_path / "pictures"), validation=0)
    folder.prepare(request, folder.list_source(str(tmp_path / "pictures"), request.fields), tmp_path / "data")
    own = {"data_dir": tmp_path / "data", "dataset": "folder/shapes", "text_length": 0, "dialogues": "", "cache": cache}
    config = load_config([CONFIG, *(f"--config.data.{key}={value}" for key, value in own.items())]).data
    batch = ExampleStream(config, None, split="train", seed=0, train=True).batch(range(3))
    assert batch_spec(config) == {name: (value.shape[1:], value.dtype) for name, value in batch.items()}
    assert batch["image"].shape == (3, 4, 16, 16, 3)
    files = [read_picture(file) for file in sorted((tmp_path / "pictures").glob("*.png"))]
    expected = [tile_picture(picture, 16, 4) for picture in files]
    order = [[one.canvas for one in expected].index(canvas) for canvas in batch["canvas"]]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_array_equal(batch["image"], np.stack([expected[place].tiles for place in order]))


def test_settings_that_cut_squares_are_refused_or_said_to_have_no_effect():
    with pytest.raises(UserError, match="max_tiles above 1 is of a vision_adapter, without buckets"):
        check_config(load_config([CONFIG, "--config.data.buckets=((16,16),(8,32))"]))
    lines = "\n".join(unread_keys(load_config([CONFIG, "--config.data.draft=True"])))
    assert "config.data.draft=True has no effect: config.data.max_tiles" in lines


def test_people_see_the_whole_canvas_as_large_as_a_tile():
    tiles, canvas = tile_picture(np.full((5, 400, 3), 7, np.uint8), 8, 4)
    shown = show_tiles(np.stack([tiles, tiles]), np.array([canvas, 0]))
    assert shown.shape == (2, 8, 8, 3) and (shown[1] == 255).all()
    assert (shown[0, 2:] == 255).all() and (shown[0, 0, :, 0] < 255).all()
