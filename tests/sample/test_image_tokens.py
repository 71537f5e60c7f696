"""A DALL-E over the tokens of whichever network makes some: vector-quantized autoencoders beside discrete VAEs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import models
from cli.config import load_config
from cli.errors import UserError
from models.autoencoder import VQAutoencoder
from sample import image_tokens
from sample.image_tokens import ImageTokens
from sample.samplers.dalle import DalleSampler
from train.objectives.dalle import DalleObjective
from train.precomputed import FIELDS

from ..models.random_parameters import random_parameters

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"image_size": 8, "width": 4, "multipliers": (1, 1), "blocks": 1, "groups": 2, "latent_channels": 2}
VQ = {"name": "autoencoder_vq", **SIZES, "vocab_size": 7, "latent_scale": 1.0}
GUMBEL = {**VQ, "name": "autoencoder_gumbel"}
KEYS = jax.random.split(jax.random.key(0), 2)


def make_config(fields, **dalle):
    network = {"name": "dalle", "text_vocab_size": 11, "text_length": 4, "image_vocab_size": 7, "image_grid": (4, 4)}
    network |= {"width": 16, "depth": 1, "heads": 2, "attention": "full", **dalle}
    frozen = {**fields, "source": "random", "part": "autoencoder"}
    groups = {"models": {"dalle": network}, "frozen": {"dvae": frozen}, "sample": {}, "loss": {}}
    return ConfigDict({"objective": "dalle", **groups})


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def test_a_vector_quantized_autoencoder_is_the_first_stage():
    objective = DalleObjective.from_config(make_config(VQ))
    sampler, model = objective.sampler, models.create_model(**VQ)
    params = {"dalle": random_parameters(sampler.model)}
    tree = {"params": random_parameters(model)}
    tree["params"]["decoder"]["output"]["bias"] += 0.8  # so that some pixels are beyond white
    frozen = {"dvae": {"params": tree["params"], "variables": {}}}
    text, image = np.array([[1, 2, 0, 0], [3, 4, 5, 6]]), pictures(2)
    tokens = jax.jit(lambda x: model.apply(tree, x, method="tokenize"))(jnp.asarray(image) / 127.5 - 1)
    assert tokens.shape == (2, 4, 4) and len(np.unique(tokens)) > 2

    batch = {"text": jnp.asarray(text, jnp.int32), "index": jnp.arange(2)}

    @jax.jit
    def loss(batch):
        return objective.loss(params, {}, frozen, batch, KEYS[0], jnp.asarray(0), True)[0]

    losses = [
        float(loss({**batch, **given}))
        for given in ({"image": jnp.asarray(image)}, {"image_tokens": tokens.reshape(2, -1)})
    ]
    assert losses[0] == losses[1]
    compute = FIELDS["image_tokens"].compute
    stored = jax.jit(lambda image: compute(sampler.image_tokens, frozen, image))(jnp.asarray(image))
    np.testing.assert_array_equal(stored, tokens.reshape(2, -1))

    drawn = sampler(params, {}, frozen, sampler.request(text, image, keep_rows=2), KEYS)
    np.testing.assert_array_equal(drawn["image_tokens"][:, :2], tokens[:, :2])
    decoded = jax.jit(lambda tokens: model.apply(tree, tokens, method="decode_tokens"))(drawn["image_tokens"])
    np.testing.assert_allclose(drawn["image"], jnp.clip(decoded, -1, 1), atol=1e-5)
    assert float(decoded.max()) > 1


def test_many_pictures_are_decoded_a_few_at_once(monkeypatch):
    stage = ImageTokens(models.create_model(**VQ))
    frozen = {"dvae": {"params": random_parameters(stage.model), "variables": {}}}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (5, 4, 4)))
    whole = jax.jit(stage.decode)(frozen, tokens)
    monkeypatch.setattr(image_tokens, "_PIXELS", 2 * 8 * 8)
    np.testing.assert_allclose(jax.jit(lambda *given: stage.decode(*given))(frozen, tokens), whole, atol=1e-6)


def test_codes_of_a_categorical_bottleneck_are_the_most_likely_ones():
    model = models.create_model(**GUMBEL)
    tree = {"params": random_parameters(model)}
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 2)), jnp.float32)
    logits = np.asarray(z) @ np.asarray(tree["params"]["logits"]["kernel"][0, 0]) + tree["params"]["logits"]["bias"]
    np.testing.assert_array_equal(model.apply(tree, z, method="quantize"), np.argmax(logits, -1))


@pytest.mark.parametrize(
    ("fields", "dalle", "message"),
    [
        (
            {"name": "autoencoder_kl", **SIZES},
            {},
            "'autoencoder_kl', which makes no tokens; one of .*_vq, dvae, dvae_strided, vqvae",
        ),
        ({**VQ, "image_size": 9}, {}, "frozen.dvae: image_size=9 is not a multiple of 2, the pixels of one token"),
        (VQ, {"image_grid": (2, 2)}, r"image_grid is \(2, 2\), but config.frozen.dvae makes \(4, 4\) tokens"),
        (VQ, {"image_vocab_size": 9}, "image_vocab_size is 9, but config.frozen.dvae has 7 codes"),
    ],
)
def test_what_does_not_fit_is_one_line(fields, dalle, message):
    with pytest.raises(UserError, match=message) as error:
        DalleSampler.from_config(make_config(fields, **dalle))
    assert "\n" not in str(error.value)


def test_the_shipped_config_over_a_vqgan_fits():
    sampler = DalleSampler.from_config(load_config([f"--config={ROOT}/configs/scenes/dalle.py:vqgan"]))
    assert sampler.image_tokens.grid == sampler.model.image_grid == (8, 8)
    assert type(sampler.image_tokens.model) is VQAutoencoder
