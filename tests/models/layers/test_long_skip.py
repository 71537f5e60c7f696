"""Long skips: each kind against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.long_skip import LongSkip

FORMULAS = {
    "concat": lambda x, s, kernel, bias: np.concatenate([x, s], axis=-1) @ kernel + bias,
    "add": lambda x, s, kernel, bias: x + s,
    "project_skip": lambda x, s, kernel, bias: x + s @ kernel + bias,
    "project_sum": lambda x, s, kernel, bias: (x + s) @ kernel + bias,
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_join_is_its_formula(kind):
    rng = np.random.default_rng(0)
    x, skip = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    kernel = rng.normal(size=(8 if kind == "concat" else 4, 4)).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    params = {} if kind == "add" else {"projection": {"kernel": kernel, "bias": bias}}
    joined: jax.Array = LongSkip(kind).apply({"params": params}, jnp.asarray(x), jnp.asarray(skip))
    np.testing.assert_allclose(joined, FORMULAS[kind](x, skip, kernel, bias), atol=1e-5)


def test_an_unknown_kind_is_refused():
    x = jnp.zeros((1, 2, 4))
    with pytest.raises(ValueError, match="unknown long skip 'cat'; choose one of concat, add"):
        LongSkip("cat").init(jax.random.key(0), x, x)
