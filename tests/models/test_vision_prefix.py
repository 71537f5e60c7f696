"""The prefix of a picture: where its vectors go, what depends on them, and cached decoding behind it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama import Llama
from models.vision_prefix import VisionPrefix

from .random_parameters import random_parameters

IMAGE = 13


@pytest.fixture(scope="module")
def tiny():
    """A network whose pictures have two tokens, its random parameters, and its compiled pass."""
    fields = {"text_vocab_size": 13, "width": 16, "depth": 1, "heads": 4, "kv_heads": 2, "mlp_hidden": 24}
    fields |= {"tile_size": 8, "patch_size": 4, "image_width": 8, "image_heads": 2, "image_layers": 1}
    fields |= {"global_layers": 0, "max_tiles": 2, "image_token": IMAGE, "extra_tokens": 1}
    model = VisionPrefix(**fields, prefix_length=2, mapper_layers=1, mapper_heads=2, mapper_hidden=16)
    return model, random_parameters(model), jax.jit(model.apply)


def inputs():
    """A text before a picture and behind it, and one of two pictures in a row; tiles and canvases."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 13, (2, 8))
    tokens[0, 2:4] = tokens[1, :4] = IMAGE
    tiles = rng.uniform(-1, 1, (2, 2, 2, 8, 8, 3))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(tiles, jnp.float32), jnp.array([[1, 0], [2, 1]])


def test_tokens_see_the_pictures_before_them_and_only_tiles_that_there_are(tiny):
    _, params, apply = tiny
    tokens, tiles, canvas = inputs()
    before = np.asarray(apply({"params": params}, tokens, tiles, canvas))
    for (text, picture, tile), first in {(0, 0, 0): 2, (1, 0, 0): 0, (1, 0, 1): 0, (1, 1, 0): 2}.items():
        changed = apply({"params": params}, tokens, tiles.at[text, picture, tile].add(1.0), canvas)
        moved = np.abs(changed - before).max(axis=-1)
        assert (moved[text, first:] > 1e-4).all() and (moved[text, :first] < 1e-6).all()
        assert (moved[1 - text] < 1e-6).all()
    absent = tiles.at[0, 0, 1].add(1.0).at[0, 1].add(1.0).at[1, 1, 1].add(1.0)  # canvas 1 is one tile, 0 no picture
    np.testing.assert_allclose(apply({"params": params}, tokens, absent, canvas), before, atol=1e-6)


def test_a_text_without_pictures_is_the_language_model_s_to_the_bit(tiny):
    model, params, apply = tiny
    tokens = jnp.where(inputs()[0] == IMAGE, 5, inputs()[0])
    language = Llama(**{name: value for name, value in model.network_at("language").items() if name != "name"})
    expected = jax.jit(language.apply)({"params": params["language"]}, tokens)
    np.testing.assert_array_equal(apply({"params": params}, tokens), expected)


def test_cached_decoding_scores_as_one_pass(tiny):
    model, params, apply = tiny
    tokens, tiles, canvas = inputs()
    variables, lengths = {"params": params}, np.array([6, 5])
    padded = jnp.where(jnp.arange(6) < lengths[:, None], tokens[:, :6], 0)
    read = jax.jit(functools.partial(model.apply, method="prefill"), static_argnums=2)
    logits, cache, sight = read(variables, padded, 2, jnp.asarray(lengths), tiles, canvas)
    step = jax.jit(functools.partial(model.apply, method="decode_step"))
    made = np.array([[3, 4], [7, 1]])
    for count in range(2):
        rows = [[*padded[row, :length], *made[row, :count]] for row, length in enumerate(lengths)]
        whole = jnp.asarray([row + [0] * (8 - len(row)) for row in rows], jnp.int32)
        expected = apply(variables, whole, tiles, canvas)[jnp.arange(2), lengths - 1 + count]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        logits, cache = step(variables, jnp.asarray(made[:, count], jnp.int32), count, cache, sight)


def test_a_mapper_that_cannot_be_is_refused(tiny):
    with pytest.raises(ValueError, match="mapper_heads=3 divide width=16"):
        random_parameters(tiny[0].clone(mapper_heads=3))
