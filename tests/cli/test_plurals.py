"""Nouns beside numbers."""

import numpy as np
import pytest

from cli.plurals import spell_count
from sample.files import Samples


@pytest.mark.parametrize(
    ("number", "nouns", "said"),
    [
        (0, ("picture",), "0 pictures"),
        (1, ("picture",), "1 picture"),
        (12000, ("picture",), "12,000 pictures"),
        (1, ("class", "classes"), "1 class"),
        (2, ("class", "classes"), "2 classes"),
    ],
)
def test_one_has_no_plural(number, nouns, said):
    assert spell_count(number, *nouns) == said


def test_what_was_made_is_counted():
    image = np.zeros((1, 2, 2, 3), np.uint8)
    assert str(Samples(image, None, [{}], {})) == "1 picture"
    assert str(Samples(image, ("a",), [{}], {})) == "1 picture with text"
    assert str(Samples(None, ("a", "b"), [{}, {}], {})) == "2 texts"
