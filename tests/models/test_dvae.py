"""The image tokenizers: published size, and the agreement of their ways in and out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.dvae import EPS, map_pixels, unmap_pixels
from models.layers.resnet import BottleneckBlock

TINY = {
    "image_size": 16,
    "vocab_size": 32,
    "encoder_hidden": 16,
    "decoder_hidden": 16,
    "decoder_init": 8,
    "width_multipliers": [1, 2],
    "blocks_per_group": 1,
    "input_kernel": 3,
}


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)


def build(name, **changes):
    """A tiny model and variables drawn by numpy at the scale of the initialization, which saves compiling that."""
    model = models.create_model(name, **{**TINY, **changes})
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    rng = np.random.default_rng(0)

    def draw(x):
        scale = 0.1 if x.ndim == 1 else np.prod(x.shape[:-1]) ** -0.5
        return jnp.asarray(rng.normal(size=x.shape, scale=scale), x.dtype)

    return model, jax.tree.map(draw, shapes)


def call(model, variables, *args, method="__call__", **kwargs):
    """`model.apply`, compiled as a whole: much sooner than one operation at a time."""
    return jax.jit(functools.partial(model.apply, method=method, **kwargs))(variables, *args)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_published_size_has_the_published_number_of_parameters():
    model = models.create_model("dvae")
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    assert size(params["encoder"]) == 53_786_240
    assert size(params["decoder"]) == 43_829_766
    assert model.token_grid == (32, 32)


def test_initial_kernels_have_the_published_scale():
    block = BottleneckBlock(128, kernels=(3, 3, 3, 1))
    params = jax.tree.map(np.asarray, block.init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))["params"])
    assert np.std(params["conv_1"]["kernel"]) == pytest.approx(1 / np.sqrt(9 * 64), rel=0.03)  # 3 x 3 x 64 x 32
    assert np.std(params["id_path"]["kernel"]) == pytest.approx(1 / np.sqrt(64), rel=0.03)
    assert not np.any(params["conv_1"]["bias"])


@pytest.mark.parametrize(
    ("name", "patch", "widths", "grid"),
    [("dvae", 1, (1, 2), 8), ("dvae", 2, (1, 2), 4), ("dvae", 4, (1,), 4), ("vqvae", 2, (1, 2), 4)],
)
def test_token_grid_is_what_tokenize_returns(name, patch, widths, grid, images):
    model, variables = build(name, patch_size=patch, width_multipliers=widths)
    tokens = call(model, variables, images, method="tokenize")
    assert model.token_grid == (grid, grid)
    assert tokens.shape == (2, grid, grid)
    assert tokens.dtype == jnp.int32
    decoded = call(model, variables, tokens, method="decode_tokens")
    assert decoded.shape == images.shape


def test_an_image_of_another_size_is_taken_where_it_divides_into_tokens(images):
    model, variables = build("dvae")
    tokens = call(model, variables, images[:, :8], method="tokenize")
    assert tokens.shape == (2, 4, 8) and call(model, variables, tokens, method="decode_tokens").shape == (2, 8, 16, 3)
    with pytest.raises(ValueError, match=r"\(7, 16, 3\) given to a tokenizer of 3 channels, whose tokens are 2 x 2"):
        call(model, variables, images[:, :7], method="tokenize")
    with pytest.raises(ValueError, match="image_size=18 is not a multiple of 4"):
        assert models.create_model("dvae", **{**TINY, "image_size": 18, "patch_size": 2}).token_grid


def test_patches_come_back_in_their_place():
    """With one group, a 1x1 input and 1x1 blocks nothing mixes; here only the rearrangement is looked at."""
    model, variables = build("dvae", patch_size=4, width_multipliers=(1,))
    tokens = jnp.zeros((1, 4, 4), jnp.int32)
    changed = tokens.at[0, 3, 0].set(5)
    difference = jnp.abs(
        call(model, variables, tokens, method="decode") - call(model, variables, changed, method="decode")
    )
    changed_rows = np.flatnonzero(np.asarray(difference.sum((0, 2, 3))))
    changed_columns = np.flatnonzero(np.asarray(difference.sum((0, 1, 3))))
    # Three 3x3 convolutions reach three tokens: rows 0..3 and columns 0..3 of the grid, but strongest at its place.
    strongest = difference.sum(-1)[0].reshape(4, 4, 4, 4).sum((1, 3))
    assert np.unravel_index(np.argmax(strongest), (4, 4)) == (3, 0)
    assert changed_rows.size and changed_columns.size


def test_pixel_map_keeps_off_the_ends_and_inverts(images):
    mapped = map_pixels(jnp.array([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3))
    np.testing.assert_allclose(mapped.ravel(), [EPS, 0.5, 1 - EPS], atol=1e-6)
    np.testing.assert_allclose(unmap_pixels(map_pixels(images)), images, atol=1e-5)


@pytest.mark.parametrize("name", ["dvae", "vqvae"])
def test_reconstruction_spans_black_to_white_and_no_further(name):
    model, variables = build(name)
    logit = np.log((1 - EPS) / EPS)
    stats = jnp.tile(jnp.array([-50.0, -logit, 0.0, logit, 50.0])[None, :, None, None], (1, 1, 1, 6))
    images = call(model, variables, stats, method="reconstruction")
    np.testing.assert_allclose(images[0, :, 0, 0], [-1, -1, 0, 1, 1], atol=1e-5)
    assert images.shape == (1, 5, 1, 3)


def test_decoding_tokens_equals_decoding_their_one_hot_codes():
    model, variables = build("dvae")
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 32, (2, 8, 8)))
    by_lookup = call(model, variables, tokens, method="decode")
    by_product = call(model, variables, jax.nn.one_hot(tokens, 32), method="decode")
    np.testing.assert_allclose(by_lookup, by_product, atol=1e-6)


def test_call_is_decode_of_the_expected_code(images):
    model, variables = build("dvae")
    logits = call(model, variables, images, method="encode")
    stats = call(model, variables, jax.nn.softmax(logits), method="decode")
    np.testing.assert_allclose(call(model, variables, images), stats, atol=1e-6)


@pytest.mark.parametrize("name", ["dvae", "vqvae"])
def test_call_reaches_every_parameter(name, images):
    model, variables = build(name)
    collections = {key: value for key, value in variables.items() if key != "params"}

    def loss(params):
        return jnp.mean((model.apply({"params": params, **collections}, images) - 1) ** 2)

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(leaf != 0), jax.tree_util.keystr(path)
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)


def test_vq_tokens_are_the_nearest_codes(images):
    model, variables = build("vqvae", code_dim=4)
    z = np.asarray(call(model, variables, images, method="encode"))
    embedding = np.asarray(variables["codebook"]["embedding"])
    nearest = ((z[..., None, :] - embedding) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(call(model, variables, images, method="tokenize"), nearest)
    np.testing.assert_array_equal(call(model, variables, jnp.asarray(nearest), method="lookup"), embedding[nearest])


@pytest.mark.parametrize("name", ["dvae", "vqvae"])
def test_bfloat16_is_finite_with_float32_ends(name, images):
    model, variables = build(name, dtype="bfloat16")
    codes, state = call(model, variables, images, method="encode", capture_intermediates=True)
    inner = state["intermediates"]["encoder"]
    assert inner["group_2_block_1"]["__call__"][0].dtype == jnp.bfloat16
    assert codes.dtype == jnp.float32
    stats, state = call(model, variables, codes, method="decode", capture_intermediates=True)
    inner = state["intermediates"]["decoder"]
    assert inner["input"]["__call__"][0].dtype == jnp.float32
    assert inner["group_1_block_1"]["__call__"][0].dtype == jnp.bfloat16
    assert stats.dtype == jnp.float32
    assert np.all(np.isfinite(codes))
    assert np.all(np.isfinite(stats))
