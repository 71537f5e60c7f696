"""The convolution has the values and derivatives of Flax's, whichever way it takes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from models.layers import partitioning
from models.layers.convolution import Conv, UpsampledConv, upsample_nearest

CASES = {
    "3x3": ((3, 3), {}),
    "strided": ((3, 3), {"strides": 2, "padding": (0, 1)}),
    "patches": ((4, 4), {"strides": 4, "padding": "VALID"}),
    "patches, uneven": ((2, 4), {"strides": (2, 4)}),
    "patches, padded": ((2, 2), {"strides": 2, "padding": 1}),
    "patches, cropped": ((3, 3), {"strides": 3, "padding": "VALID"}),
    "patches, dilated": ((2, 2), {"strides": 2, "padding": "VALID", "kernel_dilation": 2}),
    "1x1": ((1, 1), {}),
    "1x1, strided": ((1, 1), {"strides": 2}),
    "1x1, padded": ((1, 1), {"padding": 1}),
    "1x1, shifted": ((1, 1), {"padding": ((1, -1), (0, 0))}),
    "1x1, grouped": ((1, 1), {"feature_group_count": 2}),
    "3x3, bfloat16": ((3, 3), {"dtype": jnp.bfloat16}),
}


@pytest.fixture
def inputs():
    return jax.random.normal(jax.random.key(0), (5, 8, 8, 4))


def _loss(layer, params, x):
    return jnp.sum(jnp.square(layer.apply(params, x)))


def _outputs(layer, params, x):
    """The value, both gradients, a directional derivative, and gradients of two batches."""
    gradient = functools.partial(jax.grad(_loss, (1, 2)), layer)
    directions = jax.tree.map(jnp.ones_like, (params, x))
    outputs = (
        layer.apply(params, x),
        gradient(params, x),
        jax.jvp(layer.apply, (params, x), directions),
        jax.vmap(gradient, (None, 0))(params, jnp.stack([x, 2 * x])),
    )
    return [leaf.astype(np.float32) for leaf in jax.tree.leaves(outputs)]


@pytest.mark.parametrize(("kernel", "fields"), CASES.values(), ids=CASES)
def test_values_and_derivatives_are_flaxs(inputs, kernel, fields):
    ours, theirs = Conv(6, kernel, **fields), nn.Conv(6, kernel, **fields)
    params = theirs.init(jax.random.key(1), inputs)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), inputs)) == jax.tree.map(jnp.shape, params)
    tolerance = 0 if "dtype" in fields else 1e-5
    both = (_outputs(layer, params, inputs) for layer in (ours, theirs))
    for mine, expected in zip(*both, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=tolerance, atol=tolerance * np.max(np.abs(expected)))


def test_a_convolution_of_a_doubled_picture_has_its_values_and_derivatives(inputs):
    class Doubled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(6, (3, 3), name="conv")(upsample_nearest(x))

    params = UpsampledConv(6, (3, 3)).init(jax.random.key(1), inputs)
    params["params"]["bias"] += 1
    mine = _outputs(UpsampledConv(6, (3, 3)), params, inputs)
    expected = _outputs(Doubled(), {"params": {"conv": params["params"]}}, inputs)
    for leaf, other in zip(mine, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5 * np.max(np.abs(other)))


@pytest.mark.parametrize(("dtype", "convolutions"), [(jnp.float32, 4), (jnp.bfloat16, 1)])
def test_a_convolution_of_a_doubled_picture_is_four_small_ones(inputs, dtype, convolutions):
    layer = UpsampledConv(6, (3, 3), dtype=dtype)
    program = str(jax.make_jaxpr(layer.init_with_output)(jax.random.key(1), inputs))
    assert program.count("conv_general_dilated[") == convolutions
    assert ("16,16,4" in program) == (convolutions == 1)  # the doubled picture


@pytest.mark.parametrize("side", [1, 4])
def test_a_convolution_whose_windows_tile_is_a_product(inputs, side):
    layer = Conv(6, (side, side), side)
    program = str(jax.make_jaxpr(layer.init_with_output)(jax.random.key(1), inputs))
    assert "dot_general" in program and "conv_general_dilated" not in program


def _assert_plain(inputs):
    for side, stride in ((1, 1), (3, 1), (4, 4)):
        program = str(jax.make_jaxpr(Conv(6, (side, side), stride).init_with_output)(jax.random.key(1), inputs))
        assert program.count("conv_general_dilated[") == 1
    program = str(jax.make_jaxpr(UpsampledConv(6, (3, 3)).init_with_output)(jax.random.key(1), inputs))
    assert program.count("conv_general_dilated[") == 1


def test_other_devices_get_the_plain_convolution(inputs, monkeypatch):
    monkeypatch.setattr(partitioning, "device_platform", lambda: "tpu")
    _assert_plain(inputs)


def test_several_devices_get_the_plain_convolution(inputs):
    with use_abstract_mesh(AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        _assert_plain(inputs)


def test_a_switch_gives_the_plain_convolution(inputs, monkeypatch):
    monkeypatch.setenv("TESSERA_DENSE", "default")
    _assert_plain(inputs)
