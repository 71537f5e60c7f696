"""The image processor of transformers' Mllama makes the same tiles of pictures of 200 sizes."""

import numpy as np
import pytest
from transformers import MllamaImageProcessor

from data.tiles import tile_picture
from models.clip import IMAGE_MEAN, IMAGE_STD
from models.layers.tile_positions import tiles_of_canvases

SIDE = 56  # a tenth of the published tile: the same choices, and a hundredth of the pixels


@pytest.fixture(scope="module")
def processor():
    return MllamaImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=IMAGE_MEAN, image_std=IMAGE_STD)


def test_pictures_of_200_sizes(processor):
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(3), np.log(400), (196, 2))).astype(int).tolist()
    numbers = set()
    for height, width in [*sizes, (56, 56), (57, 56), (1, 300), (300, 1)]:
        # Smooth, as pictures are: two ways of rounding between pixels of noise differ by more.
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8).astype(np.float32)
        rows, columns = (np.linspace(0, 3.99, extent) for extent in (height, width))
        (r, c), (y, x) = (rows.astype(int), columns.astype(int)), (rows % 1, columns % 1)
        y, x = y[:, None, None], x[None, :, None]
        picture = (1 - y) * ((1 - x) * coarse[r][:, c] + x * coarse[r][:, c + 1])
        picture += y * ((1 - x) * coarse[r + 1][:, c] + x * coarse[r + 1][:, c + 1])
        picture = picture.astype(np.uint8)
        tiles, canvas = tile_picture(picture, SIDE, 4)
        theirs = processor(picture, input_data_format="channels_last", return_tensors="np")
        assert theirs["aspect_ratio_ids"].item() == canvas, (height, width)
        count = int(tiles_of_canvases(4)[canvas])
        assert theirs["aspect_ratio_mask"].sum() == count == theirs["num_tiles"][0][0]
        pixels = theirs["pixel_values"][0, 0].transpose(0, 2, 3, 1)
        assert not pixels[count:].any()
        pixels = pixels * np.array(IMAGE_STD) + np.array(IMAGE_MEAN)
        assert np.abs(pixels[:count] - tiles[:count] / 255).max() <= 2 / 255 + 1e-6, (height, width)
        numbers.add(canvas)
    assert numbers == set(range(1, 9))
