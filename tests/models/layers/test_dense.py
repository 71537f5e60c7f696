"""Dense layers have the values and derivatives of Flax's, as products of matrices or as Flax has them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from models.layers import partitioning
from models.layers.dense import Dense, DenseGeneral, DenseParts

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


class Stacked(nn.Module):
    """What `DenseParts` is to equal: one layer, whose outputs are taken apart."""

    features: tuple[int, ...]
    use_bias: bool = True

    def setup(self):
        self.layer = nn.DenseGeneral(self.features, use_bias=self.use_bias, bias_init=nn.initializers.normal(0.1))

    def __call__(self, x):
        return tuple(jnp.moveaxis(self.layer(x), x.ndim - 1, 0))


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


@pytest.mark.parametrize("rows", [28, 1])
@pytest.mark.parametrize("use_bias", [True, False])
def test_layers_with_stacked_parameters_are_one_layer_taken_apart(x, rows, use_bias):
    x = x.reshape(-1, 8)[:rows]
    ours = DenseParts((3, 2, 4), bias_init=nn.initializers.normal(0.1), use_bias=use_bias)
    theirs = Stacked((3, 2, 4), use_bias)
    params = ours.init(jax.random.key(1), x)
    outputs = []
    for layer, tree in ((ours, params), (theirs, {"params": {"layer": params["params"]}})):
        assert jax.tree.map(jnp.shape, layer.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, tree)

        def loss(tree, x, layer=layer):
            return sum(jnp.sum(jnp.sin((i + 1) * y)) for i, y in enumerate(layer.apply(tree, x)))

        outputs.append(jax.tree.leaves((layer.apply(tree, x), jax.grad(loss, (0, 1))(tree, x))))
    assert len(outputs[0]) == (6 if use_bias else 5)
    for mine, expected in zip(*outputs, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


def test_stacked_parameters_start_as_those_of_one_layer(x):
    ours, theirs = DenseParts((3, 2, 4)), nn.DenseGeneral((3, 2, 4))
    params = (nn.Sequential([layer]).init(jax.random.key(1), x) for layer in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.parametrize(("rows", "products"), [(28, 3), (7, 1)])
def test_layers_with_stacked_parameters_are_a_product_each_of_many_rows(x, rows, products, monkeypatch):
    layer, x = DenseParts((3, 2, 4)), x.reshape(-1, 8)[:rows]
    assert str(jax.make_jaxpr(layer.init_with_output)(jax.random.key(1), x)).count("dot_general[") == products
    monkeypatch.setenv("TESSERA_DENSE", "default")
    assert str(jax.make_jaxpr(layer.init_with_output)(jax.random.key(1), x)).count("dot_general[") == 1


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
