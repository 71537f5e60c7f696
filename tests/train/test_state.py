"""Counting more examples than an int32 holds."""

import jax
import jax.numpy as jnp

from train.state import add_examples, count_examples


def test_examples_are_counted_beyond_32_bits():
    words, expected = jnp.zeros(2, jnp.int32), 0
    add = jax.jit(add_examples, static_argnums=1)
    for number in (32_768, 2**30 - 1, 2**30 - 1, 2**30 - 1, 5):
        words, expected = add(words, number), expected + number
        assert count_examples(words) == expected
    assert expected > 2**31
