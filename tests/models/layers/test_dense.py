"""Dense layers have the values and derivatives of Flax's, as products of matrices or as Flax has them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from models.layers import partitioning
from models.layers.dense import Dense, DenseGeneral

CASES = {
    "last axis": (Dense, nn.Dense, (6,), {}),
    "several features": (DenseGeneral, nn.DenseGeneral, ((3, 2, 4),), {}),
    "several inputs": (DenseGeneral, nn.DenseGeneral, ((2, 3),), {"axis": (-2, -1)}),
    "all inputs": (DenseGeneral, nn.DenseGeneral, (5,), {"axis": (-3, -2, -1)}),
    "first axis": (DenseGeneral, nn.DenseGeneral, (5,), {"axis": 0}),
    "batched": (DenseGeneral, nn.DenseGeneral, (5,), {"batch_dims": (0,)}),
}


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (7, 4, 8))


def _program(layer, x):
    """The products that a layer and its gradient are made of."""
    loss = functools.partial(lambda params, x: jnp.sum(layer.apply(params, x) ** 2))
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(layer.init(jax.random.key(1), x), x))
    return [line for line in text.splitlines() if "dot_general[" in line]


@pytest.mark.parametrize(("ours", "theirs", "arguments", "fields"), CASES.values(), ids=CASES)
def test_values_and_derivatives_are_flaxs(x, ours, theirs, arguments, fields):
    layers = ours(*arguments, **fields), theirs(*arguments, **fields)
    params = [layer.init(jax.random.key(1), x) for layer in layers]
    jax.tree.map(np.testing.assert_array_equal, *params)
    outputs = []
    for layer in layers:
        gradient = jax.grad(lambda params, x, layer=layer: jnp.sum(jnp.sin(layer.apply(params, x))), (0, 1))
        leaves = layer.apply(params[0], x), gradient(params[0], x), jax.vmap(gradient, (None, 0))(params[0], x[None])
        outputs.append(jax.tree.leaves(leaves))
    for mine, expected in zip(*outputs, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("layer", [Dense(6), DenseGeneral((3, 2, 4)), DenseGeneral(6, axis=(-2, -1))])
def test_one_cpu_multiplies_matrices_alone(x, layer):
    products = _program(layer, x)
    assert len(products) == 3 and all(line.split("[")[1].count(",") == 1 for line in products)


def test_other_devices_get_the_plain_product(x, monkeypatch):
    monkeypatch.setattr(partitioning, "device_platform", lambda: "tpu")
    assert _program(Dense(6), x) == _program(nn.Dense(6), x)


def test_several_devices_get_the_plain_product(x):
    with use_abstract_mesh(AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        assert _program(Dense(6), x) == _program(nn.Dense(6), x)


def test_a_switch_gives_the_plain_product(x, monkeypatch):
    monkeypatch.setenv("TESSERA_DENSE", "default")
    assert _program(DenseGeneral((3, 2, 4)), x) == _program(nn.DenseGeneral((3, 2, 4)), x)
