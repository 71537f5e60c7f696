"""The activations by name, and the feed-forward block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from models.layers.mlp import ACTIVATIONS, MLP, activate


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda x: x * scipy.special.ndtr(x)),
        ("gelu_tanh", lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        ("quick_gelu", lambda x: x * scipy.special.expit(1.702 * x)),
        ("relu", lambda x: np.maximum(x, 0)),
        ("relu_squared", lambda x: np.maximum(x, 0) ** 2),
        ("silu", lambda x: x * scipy.special.expit(x)),
    ],
)
def test_activation_is_its_formula(name, function):
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), function(x), atol=2e-6)


def test_gelu_of_bfloat16_is_that_of_float32_rounded():
    x = np.linspace(-4, 4, 33, dtype=np.float32)  # which bfloat16 has exactly
    y = ACTIVATIONS["gelu"](jnp.asarray(x, jnp.bfloat16))
    np.testing.assert_allclose(y.astype(jnp.float32), x * scipy.special.ndtr(x), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_of_an_activation_its_input_alone_is_kept(name):
    x = jnp.linspace(-4, 4, 33)
    y, pull_back = jax.vjp(lambda x: activate(x, name), x)
    np.testing.assert_array_equal(y, ACTIVATIONS[name](x))
    (kept,) = jax.tree.leaves(pull_back)
    np.testing.assert_array_equal(kept, x)


def test_block_is_two_layers_around_the_activation():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    block = MLP(6, "relu_squared")
    params = block.init(jax.random.key(1), x)["params"]
    hidden = np.maximum(x @ params["up"]["kernel"] + params["up"]["bias"], 0) ** 2
    expected = hidden @ params["down"]["kernel"] + params["down"]["bias"]
    y: jax.Array = block.apply({"params": params}, x)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    with pytest.raises(ValueError, match="unknown activation 'glu'; choose one of gelu"):
        MLP(6, "glu").init(jax.random.key(1), x)
