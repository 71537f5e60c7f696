"""BLEU and CIDEr of captions: by hand, and of a run."""

import math
import sys

import numpy as np
import pytest

from cli.errors import UserError
from evaluation.__main__ import main as evaluate
from evaluation.caption_scores import bleu, cider


def test_cider_of_two_pictures_is_what_a_hand_computes():
    """Unigrams a, dog, cat are of one picture each (weight ln 2), runs of both (weight 0)."""
    texts = ["a dog runs", "cat cat"]
    references = [["a dog runs"], ["the cat runs", "one cat"]]
    first, second = cider(texts, references)
    # The first equals its reference: 10 for n = 1, 2, 3; a sentence of three words has no four in turn.
    assert first == pytest.approx(10 * 3 / 4)
    # Unigrams alone are shared. cat twice is cut to the reference's one: 1 * 1 / (2 * |reference|).
    lengths = math.exp(-1 / 72), 1.0  # three words and two beside two
    norms = math.sqrt(2), math.sqrt(2)  # the and cat, one and cat; runs weighs nothing
    by_hand = sum(near * 1 / (2 * norm) for near, norm in zip(lengths, norms, strict=True)) / 2
    assert second == pytest.approx(10 * by_hand / 4)
    np.testing.assert_array_equal(cider(["", "A CAT, runs!"], [["x"], ["a cat runs"]])[0], 0.0)
    assert cider(["z", "A CAT, runs!"], [["x"], ["a cat runs"]])[1] == pytest.approx(7.5)


def test_bleu_is_of_all_references_whatever_their_number():
    texts = ["the cat sat on the mat", "a dog ran home"]
    score, signature = bleu(texts, [["The cat sat on the mat"], ["a dog ran", "a dog ran home"]])
    assert score == pytest.approx(100) and "tok:13a" in signature and "case:lc" in signature
    # 3 of 5 words, 2 of 3 pairs, 1 of 2 threes, and none of one four, which counts as half: 0.6 * 2/3 * 1/2 * 1/2.
    assert bleu(["the cat sat here", "x"], [["the cat sat there"], ["y"]])[0] == pytest.approx(100 * 0.1**0.25)


def test_captions_of_a_run_are_compared_with_all_that_a_record_has(debug_run, capsys, monkeypatch):
    folder = debug_run("scenes/captioner.py")
    evaluate([f"--run={folder}", "--metrics=caption_scores", "--num=3", "--splits=validation"])
    said = capsys.readouterr().out
    assert "cider" in said and "bleu" in said
    with pytest.raises(UserError, match="set --num to 2 or more"):
        evaluate([f"--run={folder}", "--metrics=caption_scores", "--num=1", "--splits=validation"])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"needs sacrebleu: pip install -e '.\[captions\]'"):
        evaluate([f"--run={folder}", "--metrics=caption_scores", "--num=3", "--splits=validation"])
