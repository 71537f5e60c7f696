"""What previews show of arrays."""

import jax.numpy as jnp

from train.objectives.preview import to_host


def test_what_is_not_finite_is_black_or_white():
    images = jnp.array([jnp.nan, -jnp.inf, jnp.inf]).reshape(1, 1, 1, 3)
    assert to_host(images).ravel().tolist() == [0, 0, 255]
