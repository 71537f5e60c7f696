"""Llama: published sizes and frequencies, causality, packed texts, pads, and cached decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.rotary import RotaryEmbedding
from models.llama import Llama
from sample.decoding import Decoding, decode

from .random_parameters import random_parameters

SIZES = {
    "1b": {"width": 2048, "depth": 16, "heads": 32, "mlp_hidden": 8192, "rope_factor": 32.0, "tied": True},
    "3b": {"width": 3072, "depth": 28, "heads": 24, "mlp_hidden": 8192, "rope_factor": 32.0, "tied": True},
    "8b": {"width": 4096, "depth": 32, "heads": 32, "mlp_hidden": 14336, "rope_factor": 8.0},
    "70b": {"width": 8192, "depth": 80, "heads": 64, "mlp_hidden": 28672, "rope_factor": 8.0},
}
COUNTS = {"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248, "70b": 70_553_706_496}


@functools.cache
def tiny(**fields):
    """A network of two layers, its parameters, and its compiled pass."""
    sizes = {
        "text_vocab_size": 13,
        "width": 16,
        "depth": 2,
        "heads": 4,
        "kv_heads": 2,
        "mlp_hidden": 24,
        "rope_factor": 8.0,
    }
    model = Llama(**{**sizes, **fields})
    params = {"params": random_parameters(model)}
    return model, params, jax.jit(model.apply)


def texts(count=2, length=7, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 13, (count, length)), jnp.int32)


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_their_number_of_parameters(size):
    model = Llama(text_vocab_size=128256, kv_heads=8, **SIZES[size])
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[size]


def test_frequencies_are_the_published_ones():
    plain, scaled = RotaryEmbedding(500000.0).frequencies(128), RotaryEmbedding(500000.0, 8.0).frequencies(128)
    ratio = plain / scaled
    assert np.count_nonzero(ratio == 1) == np.count_nonzero(np.isclose(ratio, 8)) == 29
    np.testing.assert_allclose(scaled[[29, 32, 35]], [0.00216657, 5.248462e-4, 9.55621e-5], rtol=1e-5)
    np.testing.assert_allclose(RotaryEmbedding(500000.0, 32.0).frequencies(128)[32], 4.295568e-4, rtol=1e-5)


def test_scores_depend_on_the_distance_of_positions_alone():
    rotary = RotaryEmbedding(500000.0, 8.0)
    q, k = (jnp.asarray(np.random.default_rng(seed).normal(size=(1, 1, 1, 32)), jnp.float32) for seed in (0, 1))

    def score(at):
        return jnp.sum(rotary.turn(q, jnp.array([at + 5])) * rotary.turn(k, jnp.array([at])))

    np.testing.assert_allclose(score(0), score(300), rtol=1e-4)
    assert abs(score(0) - jnp.sum(q * k)) > 1e-2


def test_no_token_changes_what_is_predicted_before_it():
    _, params, apply = tiny()
    text = texts(1)
    changed = jnp.where(jnp.eye(7, dtype=bool), (text + 1) % 13, text)  # row s has token s changed
    out = apply(params, jnp.concatenate([changed, text]))
    differs = np.abs(out[:-1] - out[-1]).max(axis=-1) > 1e-5
    token, output = np.indices(differs.shape)
    assert not differs[output < token].any() and differs[output >= token].all()


def test_packed_texts_are_as_if_alone():
    _, params, apply = tiny()
    one, two = texts(1, 3, seed=1), texts(1, 4, seed=2)
    row = jnp.concatenate([one, two], axis=1)
    segments, positions = jnp.array([[0] * 3 + [1] * 4]), jnp.array([[0, 1, 2, 0, 1, 2, 3]])
    packed = apply(params, row, positions, segments)
    np.testing.assert_allclose(packed[:, :3], apply(params, one), atol=1e-5)
    np.testing.assert_allclose(packed[:, 3:], apply(params, two), atol=1e-5)
    assert np.abs(packed - apply(params, row)).max() > 1e-2  # which as one text it is not


@pytest.mark.parametrize("tied", [False, True])
def test_cached_logits_are_those_of_one_parallel_pass_whatever_pads_stand_between(tied):
    model, params, apply = tiny(tied=tied)
    text = texts(2, 7)
    lengths, prompts = np.array([4, 2]), np.array(text[:, :4])
    prompts[1, 2:] = 9  # pads
    logits, cache = model.apply(params, jnp.asarray(prompts), 3, jnp.asarray(lengths), method="prefill")
    step = jax.jit(functools.partial(model.apply, method="decode_step"))
    expected = apply(params, text)
    for made in range(3):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], expected[row, length - 1 + made], atol=1e-5)
        logits, cache = step(params, text[np.arange(2), lengths + made], made, cache)


def test_the_decoding_loop_makes_what_greedy_choice_of_full_passes_makes():
    model, params, apply = tiny()
    prompt = texts(2, 3, seed=4)
    logits, cache = model.apply(params, prompt, 3, method="prefill")
    step = functools.partial(model.apply, params, method="decode_step")
    made = decode(step, logits, cache, jax.random.split(jax.random.key(0), 2), 3, Decoding(temperature=0.0)).tokens
    row = prompt
    for _ in range(3):
        row = jnp.concatenate([row, jnp.argmax(apply(params, row)[:, -1:], axis=-1).astype(jnp.int32)], axis=1)
    np.testing.assert_array_equal(made, row[:, 3:])


def test_recomputed_and_scanned_layers_are_the_same():
    _, params, apply = tiny()
    _, _, scanned = tiny(scan=True, remat="full")
    positions = jnp.arange(7)[None] + jnp.array([[0], [5]])
    np.testing.assert_allclose(scanned(params, texts(), positions), apply(params, texts(), positions), atol=1e-5)
