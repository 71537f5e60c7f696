"""The matrix of cosines: captions stand beside it as they are written."""

import numpy as np
import pytest

from evaluation.clip.similarity import draw_similarity


@pytest.mark.parametrize("caption", ["a cheap $$ restaurant", "$5 and $10", "$^$", r"\frac{1}{2} a_b", "a cat 🐈, 雞"])
def test_captions_are_drawn_as_they_are_written(caption):
    images, cosines = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 1))
    drawn = np.asarray(draw_similarity(images, [caption], cosines))
    plain = np.asarray(draw_similarity(images, [caption.replace("$", "")], cosines))
    assert ("$" in caption) == bool((drawn != plain).any())  # a dollar is a dollar, and nothing warns
