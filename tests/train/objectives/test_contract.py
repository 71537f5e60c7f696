"""Where an example's randomness comes from."""

import jax
import jax.numpy as jnp
import numpy as np

from train.objectives.contract import example_keys


def noise(indices, step=0):
    keys = example_keys(jax.random.fold_in(jax.random.key(0), step), {"index": jnp.asarray(indices)})
    return np.asarray(jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys))


def test_noise_differs_between_examples_and_steps_and_not_with_the_split():
    whole = noise([5, 6, 7, 8])
    assert len({row.tobytes() for row in np.concatenate([whole, noise([5, 6, 7, 8], step=1)])}) == 8
    np.testing.assert_array_equal(np.concatenate([noise([5, 7]), noise([6, 8])]), whole[[0, 2, 1, 3]])
