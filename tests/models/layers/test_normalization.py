"""Norms that a condition scales and shifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.group_norm_resnet import group_norm
from models.layers.normalization import AdaptiveLayerNorm, layer_norm
from models.layers.transformer import Block, BlockInitializers


def test_a_condition_scales_and_shifts_its_own_example():
    rng = np.random.default_rng(0)
    x, condition = rng.normal(3, 2, (2, 3, 4)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    kernel, bias = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    params = {"projection": {"kernel": kernel, "bias": bias}}
    y: jax.Array = AdaptiveLayerNorm().apply({"params": params}, jnp.asarray(x), jnp.asarray(condition))
    normalized = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    scale, shift = np.split((condition @ kernel + bias)[:, None], 2, axis=-1)
    np.testing.assert_allclose(y, normalized * (1 + scale) + shift, atol=1e-5)


@pytest.mark.parametrize(("adaptive", "message"), [(True, "needs condition, none was"), (False, "takes no condition")])
def test_a_layer_takes_the_condition_that_it_was_built_for(adaptive, message):
    zeros = jax.nn.initializers.zeros
    block = Block(4, 1, 4, 8, "gelu", BlockInitializers(zeros, zeros, zeros, zeros), adaptive=adaptive)
    condition = None if adaptive else jnp.zeros((1, 4))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, 2, 4)), None, condition)


@pytest.mark.parametrize("mean", [0, 100, 1500, 10_000])
def test_a_large_mean_costs_no_variance(mean):
    x = (mean + 0.4 * np.random.default_rng(0).standard_normal(256)).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    group = group_norm(1, 1e-5, dtype=jnp.float32, param_dtype=jnp.float32, name="norm")
    outputs = (
        group.init_with_output(jax.random.key(0), jnp.asarray(x).reshape(1, 8, 8, 4))[0],
        layer_norm().init_with_output(jax.random.key(0), jnp.asarray(x).reshape(1, 1, 256))[0],
        AdaptiveLayerNorm().init_with_output(jax.random.key(0), jnp.asarray(x).reshape(1, 1, 256), jnp.zeros((1, 4)))[
            0
        ],
    )
    for output in outputs:
        np.testing.assert_allclose(np.asarray(output).ravel(), exact, atol=0.02)
