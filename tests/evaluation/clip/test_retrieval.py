"""Ranks against a sort, several captions a picture, ties, and chunks."""

import numpy as np
import pytest

from evaluation.clip import retrieval
from evaluation.clip.retrieval import retrieval_metrics, retrieval_ranks


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_ranks_are_places_in_the_sorted_list(monkeypatch, chunk):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    images, texts, owner = unit(rng, 10, 4), unit(rng, 30, 4), np.repeat(np.arange(10), 3)
    ranks = retrieval_ranks(images, texts, np.arange(10), owner)
    for place, rank in enumerate(ranks):
        others = [j for j in np.argsort(-(texts @ images[place])) if owner[j] != place]
        best = (texts[owner == place] @ images[place]).max()
        assert rank == 1 + sum(texts[j] @ images[place] > best for j in others)
    ranks = retrieval_ranks(texts, images, owner, np.arange(10))
    expected = [1 + list(np.argsort(-(images @ text))).index(own) for text, own in zip(texts, owner, strict=True)]
    np.testing.assert_array_equal(ranks, expected)


def test_equal_features_retrieve_nothing():
    same = np.ones((20, 1))
    values = retrieval_metrics(same, same, np.arange(20))
    assert values["text_to_image_r10"] == 0 and values["image_to_text_median_rank"] == 20


def test_features_that_are_no_numbers_retrieve_nothing():
    values = retrieval_metrics(np.full((20, 2), np.nan), np.ones((20, 2)), np.arange(20))
    assert values["text_to_image_r10"] == 0 and values["image_to_text_r10"] == 0


def test_own_features_retrieve_everything():
    features = unit(np.random.default_rng(1), 50, 16)
    values = retrieval_metrics(features, np.repeat(features, 2, axis=0), np.repeat(np.arange(50), 2))
    assert values["image_to_text_r1"] == values["text_to_image_r1"] == 1
    assert values["image_to_text_median_rank"] == 1
