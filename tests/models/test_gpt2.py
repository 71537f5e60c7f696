"""GPT-2: published sizes, causality, prefixes, pads, and cached decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.gpt2 import GPT2

from .random_parameters import random_parameters

# width, depth, heads; parameters of the published files, head not counted twice
SIZES = {
    "small": (768, 12, 12, 124_439_808),
    "medium": (1024, 24, 16, 354_823_168),
    "large": (1280, 36, 20, 774_030_080),
    "xl": (1600, 48, 25, 1_557_611_200),
}


@functools.cache
def tiny(**fields):
    """A network of two layers, its parameters, and its compiled pass."""
    model = GPT2(text_vocab_size=13, length=12, width=16, depth=2, heads=4, **fields)
    return model, {"params": random_parameters(model)}, jax.jit(model.apply)


def texts(count=2, length=7, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 13, (count, length)), jnp.int32)


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_their_number_of_parameters(size):
    width, depth, heads, count = SIZES[size]
    model = GPT2(text_vocab_size=50257, length=1024, width=width, depth=depth, heads=heads)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_no_token_changes_what_is_predicted_before_it():
    _, params, apply = tiny()
    text = texts(1)
    changed = jnp.where(jnp.eye(7, dtype=bool), (text + 1) % 13, text)  # row s has token s changed
    out = apply(params, jnp.concatenate([changed, text]))
    differs = np.abs(out[:-1] - out[-1]).max(axis=-1) > 1e-5
    token, output = np.indices(differs.shape)
    assert not differs[output < token].any() and differs[output >= token].all()


def test_a_prefix_of_embedded_tokens_reads_as_the_tokens_do():
    _, params, apply = tiny()
    text = texts(2)
    table = params["params"]["embedding"]["embedding"]
    np.testing.assert_allclose(apply(params, text[:, 3:], table[text[:, :3]]), apply(params, text), atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 3])
def test_cached_logits_are_those_of_one_parallel_pass_whatever_pads_stand_between(prefix):
    model, params, apply = tiny()
    text = texts(2, 7)
    vectors = None
    if prefix:
        vectors = jnp.asarray(np.random.default_rng(1).normal(size=(2, prefix, 16)), jnp.float32)
    lengths, prompts = np.array([4, 2]), np.array(text[:, :4])
    prompts[1, 2:] = 9  # pads
    logits, cache = model.apply(params, jnp.asarray(prompts), 3, jnp.asarray(lengths), vectors, method="prefill")
    step = jax.jit(functools.partial(model.apply, method="decode_step"))
    expected = apply(params, text, vectors)
    for made in range(3):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], expected[row, prefix + length - 1 + made], atol=1e-5)
        logits, cache = step(params, text[np.arange(2), lengths + made], made, cache)


def test_more_tokens_than_positions_are_refused():
    model, params, _ = tiny()
    with pytest.raises(ValueError, match="13 tokens are read, and the network's length is 12"):
        model.apply(params, texts(1, 13))
    with pytest.raises(ValueError, match="13 tokens"):  # the last one that is made is never read
        model.apply(params, texts(1, 9), 5, method="prefill")


def test_recomputed_and_scanned_layers_are_the_same():
    _, params, apply = tiny()
    expected = apply(params, texts())
    for fields in ({"scan": True}, {"remat": "full"}):
        np.testing.assert_allclose(tiny(**fields)[2](params, texts()), expected, atol=1e-5)


def test_a_network_with_more_ids_begins_at_the_mean_of_those_that_there_were():
    fewer, variables, _ = tiny()
    more = GPT2(text_vocab_size=15, length=12, width=16, depth=2, heads=4)
    adapted = more.adapt(variables["params"], fewer)
    table = variables["params"]["embedding"]["embedding"]
    np.testing.assert_array_equal(adapted["embedding"]["embedding"][:13], table)
    np.testing.assert_allclose(adapted["embedding"]["embedding"][13:], np.stack([table.mean(axis=0)] * 2), atol=1e-6)
    with pytest.raises(ValueError, match="15 ids is not cut to 13"):
        fewer.adapt(adapted, more)


def test_dropout_is_of_first_states_weights_and_what_blocks_add(monkeypatch):
    model, variables, apply = tiny(dropout=0.5)
    tokens, keys = texts(count=3), jax.random.split(jax.random.key(1), 3)
    plain = apply(variables, tokens)
    dropped = apply(variables, tokens, None, keys)
    assert np.abs(dropped - plain).max() > 1e-2
    # An example's losses are its own key's, and a network that is scanned and recomputed has the same.
    other = GPT2(text_vocab_size=13, length=12, width=16, depth=2, heads=4, dropout=0.5, scan=True, remat="full")
    again = jax.jit(other.apply)(variables, tokens[::-1], None, keys[::-1])
    np.testing.assert_allclose(again[::-1], dropped, atol=1e-5)
    shapes = []
    for module in ("gpt2", "layers.transformer", "layers.attention"):
        monkeypatch.setattr(f"models.{module}.drop", lambda x, rate, keys: shapes.append((x.shape, rate)) or x)
    np.testing.assert_allclose(model.apply(variables, tokens, None, keys), plain, atol=1e-5)
    layer = [((3, 4, 7, 7), 0.5), ((3, 7, 16), 0.5), ((3, 7, 16), 0.5)]
    assert shapes == [((3, 7, 16), 0.5), *layer, *layer]
    with pytest.raises(ValueError, match="dropout=1.0 must be at least 0 and below 1"):
        tiny(dropout=1.0)
