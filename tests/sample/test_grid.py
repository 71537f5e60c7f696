"""The labelled grid."""

import numpy as np
import pytest

from sample.grid import draw_grid, to_uint8


def test_pixels_map_to_bytes_and_are_clipped():
    assert to_uint8(np.array([[[[-1.0, 0.0, 1.0]]], [[[-5.0, 0.2, 5.0]]]])).tolist() == [
        [[[0, 128, 255]]],
        [[[0, 153, 255]]],
    ]


def test_pictures_stand_in_reading_order():
    images = np.stack([np.full((8, 8, 3), 40 * number, np.uint8) for number in range(5)])
    sheet = np.asarray(draw_grid(images, columns=3, min_side=16))
    values = [int(sheet[8 + 8 + row * 24, 8 + 8 + column * 24, 0]) for row in range(2) for column in range(3)]
    assert values[:5] == [0, 40, 80, 120, 160]
    assert values[5] > 240  # an empty place is background


def test_labels_make_room_under_the_pictures():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    plain = draw_grid(images, columns=2)
    labelled = draw_grid(images, columns=2, labels=["a short one", "a very much longer label that has to be wrapped"])
    assert labelled.width == plain.width and labelled.height > plain.height + 24
    assert (np.asarray(labelled)[plain.height :] < 100).any()  # ink


def test_marks_frame_each_picture():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    sheet = np.asarray(draw_grid(images, columns=2, marks=[True, False])).astype(int)
    first, second = sheet[6, 60], sheet[6, 196]
    assert first[1] > first[0] and second[0] > second[1]


def test_gray_pictures_are_drawn():
    assert draw_grid(np.full((1, 4, 4, 1), 200, np.uint8), columns=1).getpixel((20, 20)) == (200, 200, 200)


def test_wrong_numbers_are_errors():
    with pytest.raises(ValueError, match="no pictures"):
        draw_grid(np.zeros((0, 8, 8, 3), np.uint8), columns=2)
    with pytest.raises(ValueError, match="2 pictures but 1 labels"):
        draw_grid(np.zeros((2, 8, 8, 3), np.uint8), columns=2, labels=["one"])
