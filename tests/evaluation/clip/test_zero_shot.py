"""Zero-shot classification of features whose classes are known."""

import numpy as np
import pytest

from cli.errors import UserError
from evaluation.clip.zero_shot import class_embeddings, fill_templates, top_accuracy


def test_a_class_is_the_mean_of_its_prompts():
    features = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [-1.0, 0.0]}
    classes = class_embeddings(lambda texts: np.array([features[text] for text in texts]), [["a", "b"], ["c"]])
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5], [-1, 0]])


def test_the_nearest_class_is_the_answer_and_a_tie_is_none():
    classes = np.eye(3)
    images = np.array([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.5, 0.5, 0.0]])
    assert top_accuracy(images, classes, np.array([0, 2, 0]), top=(1, 2, 3)) == {"top_1": 1 / 3, "top_2": 2 / 3}


def test_features_that_are_no_numbers_are_never_right():
    assert top_accuracy(np.full((4, 3), np.nan), np.eye(3), np.array([0, 1, 2, 0]), top=(1, 2))["top_2"] == 0


def test_templates_are_filled():
    assert fill_templates(["cat", "dog"], ["a {}.", "the {} {}"]) == [
        ["a cat.", "the cat cat"],
        ["a dog.", "the dog dog"],
    ]
    with pytest.raises(UserError, match="has no {}"):
        fill_templates(["cat"], ["a photo"])
