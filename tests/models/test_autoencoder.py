"""The first stages of latent diffusion: published sizes to the unit, shapes, how they start, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.autoencoder import posterior

from .random_parameters import random_parameters

KL_F4 = {"multipliers": (1, 2, 4), "latent_channels": 3}
KL_F8 = {"multipliers": (1, 2, 4, 4), "latent_channels": 4}
KL_F16 = {"multipliers": (1, 1, 2, 2, 4), "latent_channels": 16, "attention_levels": (4,)}
KL_F32 = {"multipliers": (1, 1, 2, 2, 4, 4), "latent_channels": 64, "attention_levels": (4, 5)}
VQ_F4 = {**KL_F4, "vocab_size": 8192}
VQ_F8 = {"multipliers": (1, 2, 2, 4), "latent_channels": 4, "attention_levels": (3,), "vocab_size": 16384}
VQ_F16 = {**KL_F16, "latent_channels": 8, "vocab_size": 16384}

TINY = {"image_size": 16, "width": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4, "latent_channels": 3}
TINY_KL = {"name": "autoencoder_kl", **TINY, "attention_levels": (1,)}
TINY_VQ = {"name": "autoencoder_vq", **TINY, "vocab_size": 6}


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("kind", "fields", "parameters", "side"),
    [
        pytest.param("kl", KL_F4, 55_312_063, 64, id="kl-f4"),
        pytest.param("kl", KL_F8, 83_653_863, 32, id="kl-f8"),
        pytest.param("kl", KL_F16, 69_610_963, 16, id="kl-f16", marks=pytest.mark.slow),
        pytest.param("kl", KL_F32, 103_880_131, 8, id="kl-f32", marks=pytest.mark.slow),
        pytest.param("vq", VQ_F4, 55_322_782, 64, id="vq-f4", marks=pytest.mark.slow),
        pytest.param("vq", VQ_F8, 67_717_295, 32, id="vq-f8"),
        pytest.param("vq", VQ_F16, 69_593_371, 16, id="vq-f16", marks=pytest.mark.slow),
    ],
)
def test_published_sizes(kind, fields, parameters, side):
    model = models.create_model(f"autoencoder_{kind}", **fields)
    assert count(shapes(model)) == parameters
    encoded = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, method="encode")[0], images(256))
    channels = fields["latent_channels"] * (2 if kind == "kl" else 1)
    assert encoded.shape == (1, side, side, channels)


def images(height, width=0):
    return jnp.zeros((1, height, width or height, 3))


def test_stable_diffusion_s_halves():
    tree = shapes(models.create_model("autoencoder_kl", **KL_F8))
    assert {name: count(part) for name, part in tree.items()} == {
        **{"encoder": 34_163_592, "decoder": 49_490_179, "quant": 72, "post_quant": 20}
    }


def test_odd_sides_are_floored_at_each_level():
    model = models.create_model("autoencoder_kl", **KL_F8)
    tree = {"params": shapes(model)}
    encoded = jax.eval_shape(lambda tree, x: model.apply(tree, x, method="encode"), tree, images(65, 71))
    assert encoded.shape == (1, 8, 8, 8)
    decoded = jax.eval_shape(lambda tree, z: model.apply(tree, z, method="decode"), tree, jnp.zeros((1, 8, 8, 4)))
    assert decoded.shape == (1, 64, 64, 3)


def test_zeros_are_padded_behind_alone():
    """The last row and column of a picture of even sides are seen by one window of a strided convolution, not two."""
    model = models.create_model(**TINY_KL)
    tree = {"params": random_parameters(model)}
    path = ("encoder", "down_0_resample")
    _, state = model.apply(
        *(tree, jnp.ones((1, 4, 4, 3))),
        method="encode",
        capture_intermediates=lambda module, _: module.path in (path, ("encoder", "down_0_residual_0")),
    )
    outputs = state["intermediates"]["encoder"]
    (x,), (y,) = outputs["down_0_residual_0"]["__call__"], outputs["down_0_resample"]["__call__"]
    layer = tree["params"]["encoder"]["down_0_resample"]["conv"]
    first = np.einsum("hwc,hwco->o", x[0, :3, :3], layer["kernel"]) + layer["bias"]
    last = np.einsum("hwc,hwco->o", x[0, 2:, 2:], layer["kernel"][:2, :2]) + layer["bias"]
    np.testing.assert_allclose(y[0, 0, 0], first, atol=1e-5)
    np.testing.assert_allclose(y[0, 1, 1], last, atol=1e-5)


def test_a_variance_is_clipped():
    mean, log_variance = posterior(jnp.array([[1.0, 2.0, -31.0, 21.0], [0.0, 0.0, 3.0, -4.0]]))
    np.testing.assert_array_equal(mean, [[1, 2], [0, 0]])
    np.testing.assert_array_equal(log_variance, [[-30, 20], [3, -4]])


def test_everything_starts_as_in_pytorch():
    """No layer starts at 0, biases neither: kernels and biases within 1 / sqrt(inputs), and not far within."""
    model = models.create_model(**{**TINY_VQ, "attention_levels": (1,)})
    params = jax.jit(model.init)(jax.random.key(0), images(16))["params"]
    codebook = np.abs(params.pop("codebook")["embedding"])
    assert 0.5 / 6 < codebook.max() <= 1 / 6

    def check(tree, path=""):
        if "kernel" in tree:
            joint = "query_key_value" in path
            fan_in = tree["kernel"].shape[0] if joint else np.prod(tree["kernel"].shape[:-1])
            for leaf in tree.values():
                assert 0.05 < np.abs(leaf).max() * fan_in**0.5 <= 1.0001, path
            return 1
        return sum(check(value, f"{path}/{name}") for name, value in tree.items() if isinstance(value, dict))

    assert check(params) > 30


def test_decoding_looks_for_the_nearest_code():
    model = models.create_model(**TINY_VQ)
    params = random_parameters(model)
    embedding = jnp.array([[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [2, 2, 2]])
    tree = {"params": {**params, "codebook": {"embedding": embedding}}}
    z = jnp.array([[[[0.9, 0.1, 0], [0.5, 0, 0], [1.6, 1.6, 1.6], [0, 0, 0.6]]]])
    tokens = model.apply(tree, z, method="quantize")
    assert tokens.tolist() == [[[1, 0, 5, 4]]]  # the first of equals, twice
    np.testing.assert_array_equal(model.apply(tree, tokens, method="lookup"), embedding[tokens])


def test_the_last_layer_is_of_use_alone():
    """What an adaptive weight is computed at: `decode` is `pixels` of `features`."""
    model = models.create_model(**TINY_KL)
    tree = {"params": random_parameters(model)}
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 3)), jnp.float32)

    @jax.jit
    def both(tree):
        features = model.apply(tree, z, method="features")
        return features, model.apply(tree, features, method="pixels"), model.apply(tree, z, method="decode")

    features, pixels, decoded = both(tree)
    np.testing.assert_allclose(pixels, decoded, atol=1e-5)
    last = tree["params"]["decoder"]["output"]
    padded = np.pad(np.asarray(features), ((0, 0), (1, 1), (1, 1), (0, 0)))
    corner = np.einsum("hwc,hwco->o", padded[0, :3, :3], last["kernel"]) + last["bias"]
    np.testing.assert_allclose(pixels[0, 0, 0], corner, atol=1e-4)


def test_patches_are_folded_first_and_unfolded_last():
    model = models.create_model(**{**TINY_KL, "patch_size": 2})
    tree = {"params": shapes(model)}
    assert model.downsampling == 4 and tree["params"]["decoder"]["output"]["kernel"].shape == (3, 3, 8, 12)
    encoded = jax.eval_shape(lambda tree, x: model.apply(tree, x, method="encode"), tree, images(16, 20))
    assert encoded.shape == (1, 4, 5, 6)
    # Each pixel of the decoder is a square of pixels, rows first.
    last = {"bias": jnp.arange(12.0), "kernel": jnp.zeros((3, 3, 8, 12))}
    tree = {"params": {"decoder": {"output": last}}}
    pixels = model.apply(tree, jnp.zeros((1, 2, 2, 8)), method="pixels")
    assert pixels[0, :2, :2].reshape(-1).tolist() == list(range(12)) and pixels.shape == (1, 4, 4, 3)
    with pytest.raises(ValueError, match="pictures are 15 x 16, which patches of 2 do not divide"):
        model.init_with_output(jax.random.key(0), images(15, 16), method="encode")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_levels": (2,)}, "attention_levels has 2; the levels of multipliers are 0 to 1"),
        ({"groups": 3}, "groups=3 does not divide the 8 channels of a level"),
        ({"remat": "some"}, "unknown remat 'some'"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"multipliers": ()}, "multipliers is empty"),
        ({"latent_scale": 0.0}, "latent_scale=0.0 must be above 0"),
        ({"latent_shift": 0.5}, "latent_shift=0.5 needs a latent_scale"),
    ],
)
def test_impossible_fields_are_refused(change, message):
    network = models.create_model(**{**TINY_KL, **change})
    assert network.downsampling > 0  # what divides by it comes before the message
    with pytest.raises(ValueError, match=message):
        shapes(network)


@pytest.mark.parametrize(
    ("picture", "message"),
    [((4, 4, 4), "have 4 channels, the network's channels are 3"), ((1, 4, 3), "1 x 4; a latent stands for 2 pixels")],
)
def test_pictures_that_cannot_be_encoded_are_refused(picture, message):
    model = models.create_model(**TINY_KL)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda x: model.init_with_output(jax.random.key(0), x, method="encode"), jnp.zeros((1, *picture))
        )
