"""Ranks against a sort, several captions a picture, captions of several pictures, ties, and chunks."""

import numpy as np
import pytest
import scipy.sparse

from evaluation.clip import retrieval
from evaluation.clip.retrieval import match_captions, retrieval_metrics, retrieval_ranks


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def owned(owner):
    """Which captions belong to each picture, of the picture of each caption."""
    return scipy.sparse.csr_array(np.arange(max(owner) + 1)[:, None] == owner)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_ranks_are_places_in_the_sorted_list(monkeypatch, chunk):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    images, texts, owner = unit(rng, 10, 4), unit(rng, 30, 4), np.repeat(np.arange(10), 3)
    ranks = retrieval_ranks(images, texts, owned(owner))
    for place, rank in enumerate(ranks):
        others = [j for j in np.argsort(-(texts @ images[place])) if owner[j] != place]
        best = (texts[owner == place] @ images[place]).max()
        assert rank == 1 + sum(texts[j] @ images[place] > best for j in others)
    ranks = retrieval_ranks(texts, images, owned(owner).T.tocsr())
    expected = [1 + list(np.argsort(-(images @ text))).index(own) for text, own in zip(texts, owner, strict=True)]
    np.testing.assert_array_equal(ranks, expected)


def test_equal_features_retrieve_nothing():
    same = np.ones((20, 1))
    values = retrieval_metrics(same, same, owned(np.arange(20)))
    assert values["text_to_image_r10"] == 0 and values["image_to_text_median_rank"] == 20


def test_features_that_are_no_numbers_retrieve_nothing():
    values = retrieval_metrics(np.full((20, 2), np.nan), np.ones((20, 2)), owned(np.arange(20)))
    assert values["text_to_image_r10"] == 0 and values["image_to_text_r10"] == 0


def test_own_features_retrieve_everything():
    features = unit(np.random.default_rng(1), 50, 16)
    values = retrieval_metrics(features, np.repeat(features, 2, axis=0), owned(np.repeat(np.arange(50), 2)))
    assert values["image_to_text_r1"] == values["text_to_image_r1"] == 1
    assert values["image_to_text_median_rank"] == 1


def test_a_caption_that_several_pictures_have_is_right_for_each_of_them():
    """Two drawings of an apple on different backgrounds, and one of a pear."""
    captions = [("red apple", "red apple on pink"), ("red apple", "red apple on blue"), ("pear", "pear on pink")]
    texts, own = match_captions(captions)
    assert texts == [text for pair in captions for text in pair]
    np.testing.assert_array_equal(own.toarray(), [[text in pair for text in texts] for pair in captions])
    # What a network should find: a thing and a background, of which the plain names say only the first.
    images = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]])
    words = {"apple": [1, 0, 0, 0], "pear": [0, 1, 0, 0], "pink": [0, 0, 1, 0], "blue": [0, 0, 0, 1]}
    features = np.array([np.sum([words[word] for word in text.split() if word in words], axis=0) for text in texts])
    unit_features = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = retrieval_metrics(images / np.sqrt(2), unit_features, own)
    assert values["text_to_image_r1"] == values["image_to_text_r1"] == 1
