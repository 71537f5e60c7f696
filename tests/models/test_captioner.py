"""Captioners: published size, the shape of each mapper, and decoding behind a prefix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.captioner import Captioner

from .random_parameters import random_parameters

FIELDS = {"text_vocab_size": 13, "length": 14, "width": 16, "depth": 2, "heads": 4, "prefix_length": 4}
MAPPERS = {
    "bottleneck": {"feature_width": 6, "latent_width": 3},
    "mlp": {"feature_width": 5},
    "transformer": {"feature_width": 5, "mapper_states": 3, "mapper_depth": 1, "mapper_heads": 2},
}


@functools.cache
def tiny(mapper):
    model = Captioner(**FIELDS, mapper=mapper, **MAPPERS[mapper])
    return model, {"params": random_parameters(model)}


def features_of(model, count=2):
    shape = model.example_inputs(count)[1].shape
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def count(model):
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_published_text_decoder_has_its_number_of_parameters():
    sizes = {"text_vocab_size": 50258, "length": 1024, "width": 768, "depth": 12, "heads": 12, "prefix_length": 77}
    assert count(Captioner(**sizes, feature_width=768, mapper="bottleneck", latent_width=64)) == 124_539_712


def test_clipcap_s_mappers_have_the_parameters_of_their_layers():
    sizes = {"text_vocab_size": 50257, "length": 1024, "width": 768, "depth": 12, "heads": 12, "prefix_length": 10}
    mlp = Captioner(**sizes, feature_width=512, mapper="mlp")
    assert count(mlp) - 124_439_808 == 512 * 3840 + 3840 + 3840 * 7680 + 7680
    layers = Captioner(**sizes, feature_width=512, mapper="transformer", mapper_states=10, mapper_depth=8)
    layer = 4 * 768**2 + 768 + 2 * 2 * 768 + 768 * 1536 + 1536 + 1536 * 768 + 768
    assert count(layers) - 124_439_808 == 512 * 7680 + 7680 + 10 * 768 + 8 * layer


@pytest.mark.parametrize("mapper", MAPPERS)
def test_each_token_is_scored_by_features_and_the_tokens_before_it(mapper):
    model, params = tiny(mapper)
    tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32)
    features, apply = features_of(model), jax.jit(model.apply)
    scores = apply(params, tokens, features)
    assert scores.shape == (2, 4, 13)
    other = apply(params, tokens.at[:, 1].set(7), features)
    np.testing.assert_allclose(other[:, :2], scores[:, :2], atol=1e-5)
    assert np.abs(other[:, 2] - scores[:, 2]).min(axis=1).max() > 1e-6
    assert np.abs(apply(params, tokens, features + 1)[:, 0] - scores[:, 0]).max() > 1e-3


@pytest.mark.parametrize("mapper", MAPPERS)
def test_tokens_that_are_made_one_by_one_are_scored_as_in_one_pass(mapper):
    model, params = tiny(mapper)
    tokens, features = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32), features_of(model)
    expected = model.apply(params, tokens, features)
    if mapper == "bottleneck":
        latents = model.apply(params, features, method="encode")
        assert latents.shape == (2, 4, 3)
        logits, cache = model.apply(params, latents, 4, method="prefill_latents")
    else:
        logits, cache = model.apply(params, features, 4, method="prefill")
    for made in range(3):
        np.testing.assert_allclose(logits, expected[:, made], atol=1e-5)
        logits, cache = model.apply(params, tokens[:, made], made, cache, method="decode_step")
    np.testing.assert_allclose(logits, expected[:, 3], atol=1e-5)
