"""Prompts with weights: what brackets mean, what is refused, ids in chunks, and the features by hand."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from cli.errors import UserError
from data.tokenizer import Tokenizer
from sample.prompts import Weighted, encode_prompts, parse_weights
from sample.text_context import weigh


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("a (red) [cat]", [("a ", 1), ("red", 1.1), (" ", 1), ("cat", 1 / 1.1)]),
        ("(red:2.) (cat:.5)", [("red", 2), (" ", 1), ("cat", 0.5)]),
        ("((red) cat:2)", [("red", 2.2), (" cat", 2)]),
        ("[(red:1.1)] cat", [("red cat", 1)]),
        (r"\(a\) time: 12:30 \\", [("(a) time: 12:30 \\", 1)]),
        ("", []),
    ],
)
def test_what_brackets_mean(prompt, parts):
    parsed = parse_weights(prompt)
    assert [part.text for part in parsed] == [text for text, _ in parts]
    np.testing.assert_allclose([part.weight for part in parsed], [weight for _, weight in parts])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (cat", "opens a \\( that nothing closes"),
        ("a cat]", "closes a \\] that nothing opens"),
        ("(a [cat)]", "closes a \\) that nothing opens"),
        ("[a:1.3) b]", "closes a \\) that nothing opens"),
        ("at 12:30)", "closes a \\) that nothing opens"),
        ("(cat:0)", "weighs 'cat' by 0; a weight must lie between 0.01 and 100"),
        ("(cat:-1)", "weighs 'cat' by -1"),
        (f"(cat:{'9' * 400})", "weighs 'cat' by inf"),
        ("(red ((cat:20):20))", "weighs 'cat' by 400"),
        ("[" * 60 + "cat" + "]" * 60, "weighs 'cat' by 0.00"),
    ],
)
def test_mistakes(prompt, message):
    with pytest.raises(UserError, match=message):
        parse_weights(prompt)


def test_long_numbers_are_read_in_linear_time():
    start = time.process_time()
    assert parse_weights("a:" + "1" * 50_000)[0].weight == 1
    assert time.process_time() - start < 1


def test_ids_and_weights_stand_together_in_chunks(tmp_path):
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nr e\nre d</w>\n")
    words = Tokenizer.from_clip_vocabulary(tmp_path).padded_with("<|endoftext|>")
    cat, red, start, end = *words.pieces("cat red"), words.start_id, words.end_id
    prompts = [parse_weights("(cat:2) red cat cat"), (Weighted("red", 0.5),)]
    ids, weights, chunks = encode_prompts(words, prompts, 5)
    assert chunks == (2, 1)
    assert ids.tolist() == [
        [start, cat, red, cat, end, start, cat, end, end, end],
        [start, red, end, end, end, start, end, end, end, end],
    ]
    assert weights.tolist() == [[1, 2, 1, 1, 1, 1, 1, 1, 1, 1], [1, 0.5, *(1,) * 8]]
    np.testing.assert_array_equal(
        encode_prompts(words, [(Weighted("a cat", 1.0),)], 8)[0][0], words.encode("a cat", 8).ids
    )


def test_features_by_hand():
    tokens = jnp.asarray([[[1.0, 3.0], [2.0, 2.0]]])
    # Times 1 and 2: 1, 3, 4, 4 of mean 3, where it was 2.
    np.testing.assert_allclose(weigh(tokens, jnp.asarray([[1.0, 2.0]])), [[[2 / 3, 2.0], [8 / 3, 8 / 3]]], rtol=1e-6)
    np.testing.assert_array_equal(weigh(tokens, jnp.ones((1, 2))), tokens)


@pytest.mark.parametrize("weight", [1.999999, 2.0, 3.0])
def test_features_that_cancel_are_not_scaled(weight):
    """Scaled to the mean before, they would be a million times as large, infinite, or of the other sign."""
    weighed = weigh(jnp.asarray([[[1.0], [-0.5]]]), jnp.asarray([[1.0, weight]]))
    np.testing.assert_allclose(weighed, [[[1.0], [-0.5 * weight]]], rtol=1e-6)
