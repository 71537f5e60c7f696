"""LPIPS as a distance: its size, its zeros, and a gradient that is a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.lpips import unit_vectors

TINY = {"name": "lpips", "widths": (4, 4, 8, 8, 8), "image_size": 16}


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_published_sizes():
    model = models.create_model("lpips")
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    assert count({name: part for name, part in params.items() if name.startswith("conv")}) == 14_714_688
    assert count({name: part for name, part in params.items() if name.startswith("lin")}) == 1_472


def test_equal_pictures_are_at_no_distance_and_constant_ones_have_a_gradient():
    model = models.create_model(**TINY)
    x = jnp.stack([jnp.zeros((16, 16, 3)), jnp.full((16, 16, 3), -1.0)])
    tree = jax.jit(model.init)(jax.random.key(0), x, x)
    # A bias that silences every channel of every stage: all features of all pixels are 0.
    silent = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf - (path[-1].key == "bias") * 1e3, tree)

    @jax.jit
    def distance(tree, y):
        return jax.value_and_grad(lambda y: jnp.sum(model.apply(tree, x, y)))(y)

    for weights in (tree, silent):
        value, gradient = distance(weights, x)
        assert float(value) == 0
        assert np.isfinite(gradient).all()
    other, gradient = distance(tree, jnp.asarray(np.random.default_rng(0).uniform(-1, 1, x.shape), jnp.float32))
    assert float(other) > 0.01 and np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_vectors_are_divided_by_their_length():
    x = jnp.array([[[[3.0, 4.0], [0.0, 0.0], [1e-4, 0.0]]]])
    np.testing.assert_allclose(unit_vectors(x), [[[[0.6, 0.8], [0, 0], [1 / (1 + 1e-6), 0]]]], rtol=1e-6)


def test_pictures_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="pictures are 8 x 8; LPIPS needs 16 or more"):
        jax.eval_shape(models.create_model(**TINY).init, jax.random.key(0), *(jnp.zeros((1, 8, 8, 3)),) * 2)
