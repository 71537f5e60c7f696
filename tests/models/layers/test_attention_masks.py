"""The masks of DALL-E: the paper's pattern, each window written out, and what all layer types have in common."""

from collections import Counter

import numpy as np
import pytest

from models.layers.attention_masks import CONV_EDGES, LAYER_TYPES, attention_mask, attention_pattern

TEXT = 3  # caption tokens; the text block is indices 0..3
GRID = (5, 4)


def window(layer_type, j, **options):
    """Which image inputs image input j sees."""
    row = attention_mask(layer_type, TEXT, GRID, **options)[TEXT + 1 + j]
    return set(np.flatnonzero(row[TEXT + 1 :]).tolist())


def every_mask():
    """All layer types with all edges."""
    for layer_type in LAYER_TYPES:
        for edge in CONV_EDGES if layer_type == "conv" else CONV_EDGES[:1]:
            yield attention_mask(layer_type, TEXT, GRID, conv_kernel=3, conv_edge=edge)


def test_published_pattern_of_64_layers():
    pattern = attention_pattern(64)
    assert Counter(pattern) == {"row": 47, "column": 16, "conv": 1}
    assert pattern[:7] == ("row", "column", "row", "row", "row", "column", "row")
    assert pattern[-1] == "conv"


def test_pattern_of_other_depths():
    assert attention_pattern(1) == ("conv",)
    assert attention_pattern(3) == ("row", "column", "conv")
    with pytest.raises(ValueError, match="at least one layer"):
        attention_pattern(0)


@pytest.mark.parametrize(
    ("layer_type", "j", "expected"),
    [
        ("full", 6, set(range(7))),
        ("row", 15, {11, 12, 13, 14, 15}),  # W + 1 raster tokens, up to the same column of the row above
        ("row", 2, {0, 1, 2}),
        ("column", 13, {1, 5, 9, 13}),
        ("column", 3, {3}),
    ],
)
def test_window(layer_type, j, expected):
    assert window(layer_type, j) == expected


@pytest.mark.parametrize(
    ("edge", "j", "expected"),
    [
        ("wraparound", 9, {4, 5, 6, 8, 9}),
        ("wraparound", 8, {3, 4, 5, 7, 8}),  # leaves on the left, enters one row further up on the right
        ("wraparound", 11, {6, 7, 8, 10, 11}),
        ("clip", 9, {4, 5, 6, 8, 9}),
        ("clip", 8, {4, 5, 8}),
        ("modular", 9, {4, 5, 6, 8, 9}),
        ("modular", 8, {4, 5, 7, 8}),
        ("modular", 11, {4, 6, 7, 8, 10, 11}),
    ],
)
def test_convolution_window_at_the_edges(edge, j, expected):
    assert window("conv", j, conv_kernel=3, conv_edge=edge) == expected


def test_convolution_kernel_is_eleven_unless_told():
    grid = (16, 16)
    row = attention_mask("conv", TEXT, grid)[TEXT + 1 + 8 * 16 + 8]
    seen = np.append(row[TEXT + 1 :], False).reshape(grid)  # the last image token is never an input
    expected = np.zeros(grid, bool)
    expected[3:9, 3:14] = True
    expected[8, 9:] = False
    np.testing.assert_array_equal(seen, expected)


def test_every_image_position_sees_the_whole_text_block():
    for mask in every_mask():
        assert mask[TEXT + 1 :, : TEXT + 1].all()


def test_text_block_is_causal_and_no_position_sees_the_future():
    for mask in every_mask():
        assert mask.shape == (TEXT + 20, TEXT + 20)
        np.testing.assert_array_equal(mask[: TEXT + 1, : TEXT + 1], np.tri(TEXT + 1, dtype=bool))
        assert not np.triu(mask, 1).any()
        assert mask.diagonal().all()


def test_impossible_masks_are_refused():
    with pytest.raises(ValueError, match="choose one of full, row, own_row, column, conv"):
        attention_mask("diagonal", TEXT, GRID)
    with pytest.raises(ValueError, match="wraparound, clip, modular"):
        attention_mask("conv", TEXT, GRID, conv_edge="mirror")
    with pytest.raises(ValueError, match="odd"):
        attention_mask("conv", TEXT, GRID, conv_kernel=4)


def test_a_shared_mask_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        attention_mask("full", TEXT, GRID)[0, 0] = False
