"""The labelled grid."""

import numpy as np
import pytest

from cli.errors import UserError
from sample.sheets.grid import behind_given, draw_grid, draw_mosaic, draw_table, given_columns, to_uint8


def test_pixels_map_to_bytes_and_are_clipped():
    assert to_uint8(np.array([[[[-1.0, 0.0, 1.0]]], [[[-5.0, 0.2, 5.0]]]])).tolist() == [
        [[[0, 128, 255]]],
        [[[0, 153, 255]]],
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_no_color(value):
    with pytest.raises(UserError, match="not finite"):
        to_uint8(np.full((1, 2, 2, 3), value, np.float32))


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


@pytest.mark.parametrize(("num", "columns", "empty"), [(1, 2, 0), (7, 8, 0), (8, 8, 7)])
def test_each_given_picture_begins_a_row(num, columns, empty):
    made = [f"{letter}{number}" for letter in "ab" for number in range(num)]
    places = behind_given(["A", "B"], made, num, None)
    assert given_columns(num) == columns and len(places) % columns == 0 and places.count(None) == 2 * empty
    assert [places.index(given) % columns for given in "AB"] == [0, 0]
    assert [place for place in places if place] == ["A", *made[:num], "B", *made[num:]]


def test_wrong_numbers_are_errors():
    with pytest.raises(ValueError, match="no pictures"):
        draw_grid(np.zeros((0, 8, 8, 3), np.uint8), columns=2)
    with pytest.raises(ValueError, match="2 pictures but 1 labels"):
        draw_grid(np.zeros((2, 8, 8, 3), np.uint8), columns=2, labels=["one"])


def test_a_mosaic_has_its_pictures_close_together():
    images = np.stack([np.full((8, 8, 3), 40 * number, np.uint8) for number in range(3)])
    mosaic = np.asarray(draw_mosaic(images, columns=2, min_side=16))
    assert mosaic.shape == (34, 34, 3)
    assert [int(mosaic[8, 8, 0]), int(mosaic[8, 26, 0]), int(mosaic[26, 8, 0])] == [0, 40, 80]
    assert mosaic[26, 26, 0] > 240  # an empty place


def test_a_table_has_cells_under_headers_and_beside_them():
    cells = [
        [draw_mosaic(np.full((1, 64, 64, 3), value, np.uint8), columns=1) for value in row]
        for row in ((120, 140, 160), (180, 200, 220))
    ]
    table = draw_table(cells, rows=["guidance=1", "guidance=2"], columns=["steps=5", "steps=10", "steps=20"])
    pixels = np.asarray(table)
    height, width = pixels.shape[:2]
    for (row, column), value in np.ndenumerate(np.array([[120, 140, 160], [180, 200, 220]])):
        top, left = height - (2 - row) * 72, width - (3 - column) * 72
        assert (pixels[top : top + 64, left : left + 64] == value).all()
    top, left = height - 2 * 72, width - 3 * 72
    assert (pixels[:top, left:] < 100).any() and (pixels[top:, :left] < 100).any()  # ink of both headers
    assert not (pixels[:top, :left] < 100).any()
    titled = draw_table(cells, rows=["", ""], columns=[""] * 3, title="a large blue star on a white background")
    assert titled.width < table.width and (np.asarray(titled)[: titled.height - 2 * 72] < 100).any()


def test_a_table_may_have_empty_places_and_makes_room_for_long_headers():
    cell = draw_mosaic(np.full((1, 64, 64, 3), 120, np.uint8), columns=1)
    plain = draw_table([[cell, None]], rows=["x"], columns=["a", "b"])
    assert np.asarray(plain)[-40, -40, 0] > 240
    tall = draw_table([[cell, None]], rows=["a large blue star " * 10], columns=["a", "b"])
    assert tall.height > plain.height and tall.width < plain.width + 200
    with pytest.raises(ValueError, match="1 x 3 headers"):
        draw_table([[cell, None]], rows=["x"], columns=["a", "b", "c"])


def test_texts_stand_under_labels_in_another_color_and_alone_without_pictures():
    def inks(sheet):
        """Rows with ink of a label, and with ink of a text."""
        pixels = np.asarray(sheet).astype(int)
        return [
            set(np.flatnonzero((np.abs(pixels - ink) < 30).all(axis=-1).any(axis=1)))
            for ink in ((40, 40, 44), (36, 88, 160))
        ]

    images = [np.full((32, 32, 3), 255, np.uint8), None]
    told, made = inks(draw_grid(images, columns=2, labels=["a prompt", ""], texts=["", "a text"]))
    assert told and made and min(told | made) > 8 + 128  # a text begins where there is no label
    told, made = inks(draw_grid(images[:1], columns=1, labels=["a prompt"], texts=["a text"]))
    assert max(told) < min(made)
    alone = draw_grid([None] * 3, columns=1, texts=["one", "two\nlines become one", "three"])
    assert alone.height < 3 * 40 and inks(alone)[1]


def test_the_tallest_cell_of_a_row_sets_its_height():
    low, high = (draw_mosaic(np.full((count, 64, 64, 3), 90, np.uint8), columns=1) for count in (1, 2))
    table = draw_table([[low, high], [low, low]], rows=["", ""], columns=["", ""])
    assert table.height == 8 + (130 + 8) + (64 + 8)
