"""Inception-v3 of the Frechet distance: its size, its resize, and what it promises about pictures."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.inception import average_pool, resize_tf1

TINY = {"width_divisor": 16, "image_size": 75, "classes": 10}


@pytest.fixture(scope="module")
def tiny():
    model = models.create_model("inception", **TINY)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    return model, jax.tree_util.tree_map_with_path(random_leaf, shapes)  # compiling `init` would take longer than all


def random_leaf(path, leaf):
    """Kernels that keep the scale of features, biases that keep them from vanishing, and a variance of 1."""
    if path[-1].key in ("scale", "var"):
        return jnp.ones(leaf.shape)
    stddev = np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.5
    return jnp.asarray(np.random.default_rng(zlib.crc32(str(path).encode())).normal(0, stddev, leaf.shape), jnp.float32)


@pytest.fixture(scope="module")
def apply(tiny):
    """The network on three pictures of 40 x 50, compiled once."""
    return jax.jit(tiny[0].apply)


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_published_size():
    """23,834,568 without the auxiliary classifier at 1000 classes (torchvision), and 8 classes more."""
    model = models.create_model("inception")
    images = jax.ShapeDtypeStruct((2, 32, 40, 3), jnp.float32)
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert count(variables["params"]) == 23_834_568 + 8 * (2048 + 1)
    assert count(variables["batch_stats"]) == 2 * 17_216  # two for each channel of 94 convolutions
    assert outputs["features"].shape == (2, 2048)
    assert outputs["logits"].shape == outputs["logits_unbiased"].shape == (2, 1008)


def test_a_picture_is_measured_alone(tiny, apply):
    noise = np.random.default_rng(0).uniform(0, 255, (3, 40, 50, 3))
    images = jnp.asarray(noise * np.array([0.1, 0.5, 1.0])[:, None, None, None], jnp.float32)
    features = apply(tiny[1], images)["features"]
    beside_others = apply(tiny[1], jnp.concatenate([images[1:2], 255 - images[:2]]))["features"]
    np.testing.assert_allclose(features[1], beside_others[0], rtol=1e-4, atol=1e-4)
    assert abs(features[0] - features[1]).max() > 1e-2  # these weights tell pictures apart


def test_logits_differ_by_the_bias(tiny, apply):
    _, variables = tiny
    bias = jnp.arange(10.0)
    outputs = apply({**variables, "params": {**variables["params"], "fc_bias": bias}}, jnp.full((3, 40, 50, 3), 200.0))
    np.testing.assert_allclose(outputs["logits"] - outputs["logits_unbiased"], np.tile(bias, (3, 1)), atol=1e-4)
    assert outputs["logits_unbiased"].std() > 0


def test_impossible_sizes():
    with pytest.raises(ValueError, match="width_divisor=3"):
        jax.eval_shape(
            models.create_model("inception", width_divisor=3).init, jax.random.key(0), jnp.zeros((1, 9, 9, 3))
        )
    with pytest.raises(ValueError, match="image_size=74"):
        jax.eval_shape(models.create_model("inception", image_size=74).init, jax.random.key(0), jnp.zeros((1, 9, 9, 3)))


def test_the_pool_leaves_padding_out():
    pooled = average_pool(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, :, :, 0]
    assert pooled[0, 0] == np.mean([0, 1, 3, 4]) and pooled[0, 1] == np.mean([0, 1, 2, 3, 4, 5]) and pooled[1, 1] == 4


@pytest.mark.parametrize(("before", "size"), [(4, 6), (9, 5), (7, 7), (1, 3), (2, 4)])
def test_resize_is_tensorflow_1_s(before, size):
    """Against its definition, pixel by pixel: corners coincide, two neighbors are mixed, nothing is smoothed."""
    image = np.random.default_rng(0).uniform(0, 255, (before, before))
    expected = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * before / size, column * before / size
            top, left = int(y), int(x)
            below, right = min(top + 1, before - 1), min(left + 1, before - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[below, left] + (image[below, right] - image[below, left]) * (x - left)
            expected[row, column] = upper + (lower - upper) * (y - top)
    resized = resize_tf1(jnp.asarray(image, jnp.float32)[None, :, :, None], size)
    np.testing.assert_allclose(resized[0, :, :, 0], expected, atol=1e-3)
