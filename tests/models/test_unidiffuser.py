"""UniDiffuser: published sizes, times of each side, pictures of other shapes, and recomputed layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.transformer import Block, BlockInitializers
from models.unidiffuser import PictureAndText, UniDiffuser

from .random_parameters import random_parameters

PUBLISHED = {"image_size": 64, "patch_size": 2, "width": 1536, "depth": 30, "heads": 24, "in_channels": 4}
PUBLISHED |= {"clip_width": 512, "text_length": 77, "text_width": 64}
TINY = {"image_size": 4, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "in_channels": 3}
TINY |= {"clip_width": 5, "text_length": 3, "text_width": 4}


@functools.cache
def tiny(**fields):
    model = UniDiffuser(**TINY, **fields)
    return model, {"params": random_parameters(model)}, jax.jit(model.apply)


def inputs(size=(4, 4), count=2):
    rng = np.random.default_rng(0)
    shapes = (*size, 3), (5,), (3, 4)
    return PictureAndText(*(jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32) for shape in shapes))


@pytest.mark.parametrize(("kinds", "count"), [(0, 952_504_912), (2, 952_509_520)])
def test_published_sizes_have_their_number_of_parameters(kinds, count):
    model = UniDiffuser(**PUBLISHED, data_types=kinds)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert sum(sizes.values()) == count
    assert (sizes["in_blocks_0"], sizes["skips_0"]) == (28_326_912, 4_723_200)


def test_a_layer_with_its_norms_behind_is_its_formula():
    init = nn.initializers.normal(0.3)
    block = Block(8, 2, 4, 16, "gelu", BlockInitializers(init, init, init, init), post_norm=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)

    @jax.jit
    def compute(x):
        bound = block.bind(block.init(jax.random.key(0), x))
        y = bound.attention_norm(x + bound.attention(x))
        _, cache = bound.prefill(x[:, :2], np.tri(2, dtype=bool), 3)
        last, _ = bound.decode(x[:, 2:], jnp.ones((1, 3), bool), jnp.int32(2), cache)
        return bound(x), bound.mlp_norm(y + bound.mlp(y)), last[:, 0]

    out, formula, last = compute(x)
    np.testing.assert_allclose(out, formula, atol=1e-6)
    np.testing.assert_allclose(last, out[:, 2], atol=1e-5)


def test_each_side_has_its_own_time():
    _, params, apply = tiny()
    x, zero = inputs(), jnp.zeros(2)
    plain, image, text = (apply(params, x, *t) for t in ((zero, zero), (zero + 900, zero), (zero, zero + 900)))
    for changed in (image, text):
        pairs = zip(jax.tree.leaves(changed), jax.tree.leaves(plain), strict=True)
        assert min(np.abs(a - b).max() for a, b in pairs) > 1e-4
    assert np.abs(image.text - text.text).max() > 1e-4


def test_kinds_of_data_are_told_apart_and_the_last_is_assumed():
    _, params, apply = tiny(data_types=2)
    x, t = inputs(), jnp.zeros(2)
    told = apply(params, x, t, t, jnp.array([0, 1]))
    assumed = apply(params, x, t, t)
    assert np.abs(told.clip - assumed.clip)[0].max() > 1e-4
    np.testing.assert_allclose(told.clip[1], assumed.clip[1], atol=1e-6)


def test_pictures_of_other_shapes_are_read_and_given_back():
    _, params, apply = tiny()
    t = jnp.zeros(2)
    out = apply(params, inputs((4, 8)), t, t)
    assert out.image.shape == (2, 4, 8, 3)
    with pytest.raises(ValueError, match="its patch_size 2"):
        apply(params, inputs((4, 5)), t, t)


def test_scanned_and_recomputed_layers_are_the_same():
    _, params, apply = tiny()
    x, t = inputs(), jnp.full(2, 30.0)
    expected = apply(params, x, t, t)
    for fields in ({"scan": True}, {"remat": "full"}):
        out = tiny(**fields)[2](params, x, t, t)
        for ours, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_positions_of_a_smaller_network_are_interpolated_once_as_they_are_at_every_call():
    small, variables, apply = tiny()
    params, large = variables["params"], UniDiffuser(**{**TINY, "image_size": 8})
    adapted = large.adapt(params, small)
    assert adapted["position"]["embedding"].shape[0] - params["position"]["embedding"].shape[0] == 16 - 4
    times = jnp.array([3.0, 500.0]), jnp.array([700.0, 0.0])
    x = inputs((8, 8))
    once, each_time = jax.jit(large.apply)({"params": adapted}, x, *times), apply({"params": params}, x, *times)
    for name in ("image", "clip", "text"):
        np.testing.assert_allclose(getattr(once, name), getattr(each_time, name), atol=1e-6)
