"""Byte-pair encoding: round trips, padding, truncation and seeded dropout."""

import numpy as np
import pytest

from cli.errors import UserError
from data.tokenizer import PAD_ID, Tokenizer

TEXTS = ["a small red circle on black", "a large blue square on gray", "a big yellow star"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


def test_frequent_words_become_one_token(tokenizer):
    assert np.count_nonzero(tokenizer.encode("a small red circle on black", 12).ids) == 6


@pytest.mark.parametrize("text", ["a small red circle", "ünïcödé ☃ 数", "never-seen words, 123!", "a  b"])
def test_any_text_survives_the_round_trip(tokenizer, text):
    import unicodedata

    encoded = tokenizer.encode(text, 64)
    assert not encoded.truncated
    assert tokenizer.decode(encoded.ids) == unicodedata.normalize("NFKC", text.lower())


def test_case_does_not_matter(tokenizer):
    assert (tokenizer.encode("A Small RED circle", 8).ids == tokenizer.encode("a small red circle", 8).ids).all()


def test_ids_are_padded_or_cut_to_the_length(tokenizer):
    long = tokenizer.encode("a small red circle on black", 3)
    assert long.truncated and long.ids.shape == (3,)
    short = tokenizer.encode("a", 5)
    assert not short.truncated and (short.ids[1:] == PAD_ID).all() and short.ids.dtype == np.int32
    assert (tokenizer.encode("a small red circle on black", 6).ids[:3] == long.ids).all()


def test_an_empty_caption_is_all_padding(tokenizer):
    assert (tokenizer.encode("", 4).ids == PAD_ID).all()


def test_dropout_is_seeded_and_keeps_the_text(tokenizer):
    text = "a small red circle on black"
    draws = [tokenizer.encode(text, 64, 0.5, np.random.default_rng(seed)).ids for seed in (1, 1, 2, 3)]
    assert (draws[0] == draws[1]).all()
    assert any((draws[0] != other).any() for other in draws[2:])
    assert all(tokenizer.decode(ids) == text for ids in draws)
    assert np.count_nonzero(draws[0]) > np.count_nonzero(tokenizer.encode(text, 64).ids)


def test_dropout_near_zero_gives_the_plain_encoding(tokenizer):
    for text in set(TEXTS):
        dropped = tokenizer.encode(text, 32, 1e-12, np.random.default_rng(0)).ids
        assert (dropped == tokenizer.encode(text, 32).ids).all()


def test_dropout_of_one_gives_bytes(tokenizer):
    ids = tokenizer.encode("red", 16, 1.0 - 1e-12, np.random.default_rng(0)).ids
    assert np.count_nonzero(ids) == len(" red")


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.vocab_size == tokenizer.vocab_size <= 400
    assert (again.encode(TEXTS[0], 8).ids == tokenizer.encode(TEXTS[0], 8).ids).all()


def test_training_is_deterministic(tokenizer):
    again = Tokenizer.train(TEXTS, 400)
    assert again.vocab_size == tokenizer.vocab_size
    assert all((again.encode(text, 16).ids == tokenizer.encode(text, 16).ids).all() for text in TEXTS)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="at least 257"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer file"):
        Tokenizer.load(tmp_path / "broken.json")
