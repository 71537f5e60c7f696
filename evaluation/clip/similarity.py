"""The matrix of similarities between pictures and captions, as CLIP's authors drew it."""

import io
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image

from data.pictures import open_picture


def draw_similarity(
    images: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str], cosines: Float[np.ndarray, "m n"]
) -> Image.Image:
    """Draws captions as rows, pictures as columns, and each cosine in its cell, darker where it is higher.

    Captions are drawn as they are written: dollar signs are no formula, and what the font lacks is its box.
    """
    with matplotlib.rc_context({"font.size": 8, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        figure = Figure(figsize=(4 + 0.6 * len(images), 1 + 0.6 * len(captions)), dpi=100)
        axes = figure.add_axes((0.42, 0.03, 0.56, 0.84))
        axes.imshow(cosines, cmap="Blues", aspect="auto")
        axes.set_yticks(range(len(captions)), captions)
        axes.set_xticks([])
        middle = (cosines.min() + cosines.max()) / 2
        for row, column in np.ndindex(*cosines.shape):
            value = cosines[row, column]
            color = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7)
        for column, image in enumerate(images):
            inset = axes.inset_axes((column - 0.42, -1.45, 0.84, 0.84), transform=axes.transData)
            inset.imshow(image, interpolation="nearest")
            inset.axis("off")
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return open_picture(stream.getvalue())
