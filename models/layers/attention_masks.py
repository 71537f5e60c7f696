"""The attention masks of DALL-E: which input may look at which, for a caption followed by a raster of image tokens.

Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.2 and appendix B.1. Pure numpy.

The masks are aligned with the *input* tokens. The network reads

    index   0      1        ...  T        T+1      ...  T+1+j    ...  T+N-1
    input   BOS    text 1   ...  text T   image 0  ...  image j  ...  image N-2
    output  text 1 text 2   ...  image 0  image 1  ...  image j+1 ... image N-1

so the text block is the T+1 indices 0..T, and an image position is named after the image token that it reads. The
alternative names it after the token that it predicts, which moves the last caption token (it predicts image token 0)
into the image block; the row, column and convolution windows would then leave it behind, and image positions would no
longer see all of the text, as the paper asks.
"""

import functools

import numpy as np

LAYER_TYPES = ("full", "row", "own_row", "column", "conv")
CONV_EDGES = ("wraparound", "clip", "modular", "corner")


def attention_pattern(depth: int) -> tuple[str, ...]:
    """The published layer types of a network of `depth` layers (appendix B.1).

    Counting from 1, the last layer is "conv", layer i is "column" where (i - 2) mod 4 = 0, and the others are "row".
    Depth 64 gives 47 row, 16 column and 1 convolutional layer.

    Raises:
      ValueError: if there is no layer.
    """
    if depth < 1:
        raise ValueError(f"a network has at least one layer, not {depth}")
    layers = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, depth)]
    return (*layers, "conv")


@functools.lru_cache(maxsize=64)
def attention_mask(
    layer_type: str, text_length: int, grid: tuple[int, int], conv_kernel: int = 11, conv_edge: str = "wraparound"
) -> np.ndarray:
    """The mask of one layer over [text block | image block], L = text_length + height * width.

    The text block is causal. Every image position sees the whole text block, and of the image block, at image input j
    on row r and column c of a grid of width W:

    * "full": all inputs up to j.
    * "row": the W + 1 raster inputs j-W .. j, so that it reaches the same column of the row above.
    * "own_row": the inputs of row r up to j (dalle_pytorch's rows).
    * "column": the inputs of column c up to j.
    * "conv": the inputs up to j in a conv_kernel x conv_kernel square centered on j. What the square holds beyond the
      left and right edges is `conv_edge`: "wraparound" takes offsets in the flattened raster, so a window that leaves
      the grid on one side enters on the other, one row further, as the row window does; "clip" drops what lies
      outside the grid; "modular" wraps rows and columns each on their own; "corner" has j in the square's lower right
      corner and not in its center, and drops what lies outside the grid (dalle_pytorch's convolutions).

    Args:
      layer_type: one of `LAYER_TYPES`.
      text_length: number of caption tokens T, without BOS.
      grid: (height, width) of the image tokens.
      conv_kernel: side of the convolution window, odd.
      conv_edge: one of `CONV_EDGES`.

    Returns:
      Bool array [L, L], read-only; row = the position that looks, column = what it may see, True = attend.

    Raises:
      ValueError: on an unknown layer type or edge, or an even kernel.
    """
    if layer_type not in LAYER_TYPES:
        raise ValueError(f"unknown attention layer type {layer_type!r}; choose one of {', '.join(LAYER_TYPES)}")
    if conv_edge not in CONV_EDGES:
        raise ValueError(f"unknown conv_edge {conv_edge!r}; choose one of {', '.join(CONV_EDGES)}")
    if conv_kernel < 1 or conv_kernel % 2 == 0:
        raise ValueError(f"conv_kernel must be odd and positive, not {conv_kernel}")
    height, width = grid
    block, length = text_length + 1, text_length + height * width
    mask = np.tril(np.ones((length, length), dtype=bool))
    # The last image token is never an input, so the image block has one position less than the grid.
    mask[block:, block:] &= _image_window(layer_type, height, width, conv_kernel, conv_edge)[:-1, :-1]
    mask.flags.writeable = False  # shared by every caller through the cache
    return mask


def _image_window(layer_type: str, height: int, width: int, kernel: int, edge: str) -> np.ndarray:
    """Which image input lies in whose window, [height * width, height * width], before causality."""
    index = np.arange(height * width)
    offset = index[:, None] - index[None, :]
    row, column = np.divmod(index, width)
    rows, columns = row[:, None] - row[None, :], column[:, None] - column[None, :]
    if layer_type == "full":
        return np.ones_like(offset, dtype=bool)
    if layer_type == "row":
        return offset <= width
    if layer_type == "own_row":
        return rows == 0
    if layer_type == "column":
        return columns == 0
    if edge == "corner":
        return (rows >= 0) & (rows < kernel) & (columns >= 0) & (columns < kernel)
    reach = kernel // 2
    if edge == "clip":
        return (np.abs(rows) <= reach) & (np.abs(columns) <= reach)
    if edge == "modular":
        return (_ring_distance(rows, height) <= reach) & (_ring_distance(columns, width) <= reach)
    steps = np.arange(-reach, reach + 1)
    return np.isin(offset, steps[:, None] * width + steps[None, :])


def _ring_distance(difference: np.ndarray, size: int) -> np.ndarray:
    """The shorter way round a ring of `size` places."""
    forward = difference % size
    return np.minimum(forward, size - forward)
