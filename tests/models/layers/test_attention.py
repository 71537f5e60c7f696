"""Attention against JAX's own, its masks and precision, and decoding from a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.attention import SelfAttention, attend

KEY = jax.random.key(0)
CAUSAL = np.tri(6, dtype=bool)


def inputs(dtype=jnp.float32, scale=1.0):
    """q, k, v of shape [2 6 3 8]."""
    q, k, v = np.random.default_rng(0).normal(scale=scale, size=(3, 2, 6, 3, 8))
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


@pytest.mark.parametrize("mask", [None, CAUSAL, np.array([True, False, True, True, False, True])[None, None, None]])
def test_attention_and_its_gradients_are_those_of_jax(mask):
    def reference(q, k, v):
        full = None if mask is None else jnp.asarray(mask)[(None,) * (4 - mask.ndim)]
        return jax.nn.dot_product_attention(q, k, v, mask=full)

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), argnums=(0, 1, 2)))(*inputs())

    np.testing.assert_allclose(attend(*inputs(), mask), reference(*inputs()), atol=2e-6)
    for ours, theirs in zip(gradients(lambda q, k, v: attend(q, k, v, mask)), gradients(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_masks_may_differ_in_the_batch():
    q, k, v = inputs()
    mask = jnp.stack([jnp.ones((1, 1, 6), bool), jnp.array([[[True] * 2 + [False] * 4]])])
    out = attend(q, k, v, mask)
    np.testing.assert_allclose(out[0], attend(q, k, v)[0], atol=1e-6)
    np.testing.assert_allclose(out[1], attend(q, k[:, :2], v[:, :2])[1], atol=1e-6)


def test_hidden_positions_get_no_gradient():
    mask = np.ones((6, 6), bool)
    mask[:, 4] = False
    q, k, v = inputs()
    for gradient in jax.jit(jax.grad(lambda k, v: jnp.sum(attend(q, k, v, mask) ** 2), argnums=(0, 1)))(k, v):
        assert jnp.all(gradient[:, 4] == 0)
        assert jnp.any(gradient[:, 3] != 0)


def test_bfloat16_scores_are_summed_in_float32():
    q, k, v = inputs(jnp.bfloat16)
    out = attend(q, k, v, CAUSAL)
    assert out.dtype == jnp.bfloat16
    exact = attend(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), CAUSAL)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)
    text = str(jax.make_jaxpr(lambda q, k, v: attend(q, k, v, CAUSAL))(q, k, v))
    assert [line for line in text.splitlines() if " exp " in line and "f32" in line]


def test_large_bfloat16_scores_stay_finite():
    out = attend(*inputs(jnp.bfloat16, scale=1e4), CAUSAL)
    assert jnp.all(jnp.isfinite(out.astype(jnp.float32)))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="choose one of xla, cudnn"):
        attend(*inputs(), None, "flash")


def test_decoding_from_a_cache_is_attention_in_parallel():
    layer = SelfAttention(width=12, heads=3, head_dim=8, kernel_init=jax.nn.initializers.normal(0.5))
    x = jax.random.normal(KEY, (2, 6, 12))
    mask = CAUSAL.copy()
    mask[5, 1] = False  # not only causal
    params = jax.jit(layer.init)(KEY, x, mask)
    expected = jax.jit(layer.apply)(params, x, mask)
    y, cache = jax.jit(lambda *inputs: layer.apply(*inputs, 6, method="prefill"))(params, x[:, :2], mask[:2, :2])
    decode = jax.jit(functools.partial(layer.apply, method="decode"))
    np.testing.assert_allclose(y, expected[:, :2], atol=1e-6)
    for i in range(2, 6):
        y, cache = decode(params, x[:, i : i + 1], mask[i : i + 1], i, cache)
        np.testing.assert_allclose(y, expected[:, i : i + 1], atol=1e-6)
