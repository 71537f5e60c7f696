"""Diffusion in latents: what a first stage makes of pictures and back, and where that is used."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import models
from cli.config import load_config
from cli.errors import UserError
from data.pipeline import open_stream
from models.autoencoder import posterior
from sample import first_stage
from sample.first_stage import FirstStage
from sample.samplers.diffusion import DiffusionSampler
from sample.sheets.grid import to_uint8
from train.objectives.contract import example_keys
from train.objectives.diffusion import DiffusionObjective
from weights.sources import load_frozen, resolve_frozen

from ..models.random_parameters import random_parameters

ROOT = Path(__file__).resolve().parents[2]

SHARED = {"image_size": 8, "width": 4, "multipliers": (1, 1), "blocks": 1, "groups": 2, "latent_channels": 2}
KL = {"name": "autoencoder_kl", **SHARED, "latent_shift": 0.25, "latent_scale": 0.5}
MEASURED = {"name": "autoencoder_kl", **SHARED}
VQ = {"name": "autoencoder_vq", **SHARED, "vocab_size": 6, "latent_scale": 2.0}
STATISTICS = {
    "statistics": {"latents": {"mean": jnp.asarray(0.25), "square": jnp.asarray(4.0625), "count": jnp.asarray(3.0)}}
}


def opened(fields, variables=None):
    """(the first stage, its frozen tree)."""
    model = models.create_model(**fields)
    return FirstStage(model), {"first_stage": {"params": random_parameters(model), "variables": variables or {}}}


def pictures(count=3):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8))


KEYS = example_keys(jax.random.key(7), {"index": jnp.arange(3)})


@pytest.mark.parametrize(("fields", "variables"), [(KL, {}), (MEASURED, STATISTICS)], ids=["published", "measured"])
def test_latents_are_scaled_in_and_out(fields, variables):
    stage, frozen = opened(fields, variables)
    images = pictures() / 127.5 - 1

    @jax.jit
    def run(images):
        z = stage.encode(frozen, images, KEYS)
        tree = {"params": frozen["first_stage"]["params"]}
        mean, log_variance = posterior(stage.model.apply(tree, images, method="encode"))
        drawn = mean + jnp.exp(log_variance / 2) * jax.vmap(lambda key: jax.random.normal(key, (4, 4, 2)))(KEYS)
        decoded = jnp.clip(stage.model.apply(tree, drawn, method="decode"), -1, 1)
        return z, drawn, stage.decode(frozen, z), decoded

    z, drawn, images, decoded = run(images)
    np.testing.assert_allclose(z, (drawn - 0.25) * 0.5, atol=1e-5)
    np.testing.assert_allclose(images, decoded, atol=1e-5)
    assert images.shape == (3, 8, 8, 3) and float(jnp.abs(images).max()) <= 1


def test_codes_are_looked_for_when_latents_are_decoded():
    stage, frozen = opened(VQ)
    images = pictures() / 127.5 - 1

    @jax.jit
    def run(images):
        tree = {"params": frozen["first_stage"]["params"]}
        z = stage.encode(frozen, images, KEYS)
        vectors = stage.model.apply(tree, images, method="encode")
        tokens = stage.model.apply(tree, images, method="tokenize")
        decoded = jnp.clip(stage.model.apply(tree, tokens, method="decode_tokens"), -1, 1)
        return z, vectors, stage.decode(frozen, z), decoded

    z, vectors, images, decoded = run(images)
    np.testing.assert_allclose(z, 2 * vectors, atol=1e-5)
    np.testing.assert_allclose(images, decoded, atol=1e-5)


def test_many_pictures_are_decoded_in_parts(monkeypatch):
    stage, frozen = opened(KL)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 2)), jnp.float32)
    whole = jax.jit(functools.partial(stage.decode, frozen))(z)
    monkeypatch.setattr(first_stage, "_PIXELS", 2 * 64)
    np.testing.assert_allclose(jax.jit(functools.partial(stage.decode, frozen))(z), whole, atol=1e-6)


def test_latents_of_a_trained_first_stage_have_mean_0_and_deviation_1(debug_run, scenes_dir):
    """What training measured is of the weights that are used, the moving average, and of the training set."""
    config = load_config([f"--config={ROOT}/configs/scenes/latent_unet.py:debug"])
    config.frozen.first_stage.source = str(debug_run("scenes/autoencoder.py"))
    config.data.data_dir = str(scenes_dir)
    resolve_frozen(config)
    stage, frozen = FirstStage.from_config(config), load_frozen(config)
    count = float(frozen["first_stage"]["variables"]["statistics"]["latents"]["count"])
    stream = open_stream(config.data, None, split="train", seed=3, train=False)
    batch = stream.batch(range(stream.epoch_size))
    assert count == stream.epoch_size // 8
    keys = example_keys(jax.random.key(5), {"index": jnp.asarray(batch["index"])})
    z = jax.jit(functools.partial(stage.encode, frozen))(batch["image"] / np.float32(127.5) - 1, keys)
    assert abs(float(z.mean())) < 0.01 and float(z.std()) == pytest.approx(1, abs=0.01)


def latent_config(fields=KL, process=None, **denoiser):
    return ConfigDict(
        {
            "objective": "diffusion",
            "data": {"image_size": 8, "text_length": 0, "label_field": ""},
            "models": {
                "denoiser": {
                    **{"name": "unet", "image_size": 4, "in_channels": 2, "width": 4, "multipliers": (1,), "blocks": 1},
                    **{"attention_levels": (), "heads": 1, "groups": 2, **denoiser},
                }
            },
            "frozen": {"first_stage": dict(fields)},
            "process": {"schedule": {"name": "discrete", "kind": "linear"}, **(process or {})},
            "sample": {"sampler": "ddim", "steps": 2},
            "loss": {},
        }
    )


def test_a_diffusion_learns_latents_and_draws_pictures():
    """An output of zeros has the loss of the noise, if x_0 is the latents that x_t is made of."""
    objective = DiffusionObjective.from_config(latent_config(process={"prediction": "x0"}))
    sampler = objective.sampler
    stage, frozen = opened(KL)
    params = {"denoiser": jax.tree.map(jnp.zeros_like, random_parameters(sampler.model))}
    batch = {"image": pictures(), "index": jnp.arange(3)}
    key = jax.random.key(7)

    @jax.jit
    def run(params):
        loss, _ = objective.loss(params, {}, frozen, batch, key, jnp.asarray(0), True)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(example_keys(key, batch), 4)
        return loss, jnp.mean(jnp.square(stage.encode(frozen, batch["image"] / 127.5 - 1, keys)))

    loss, expected = run(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)

    request = sampler.request(trajectory=True)
    outputs = sampler(params, {}, frozen, request, KEYS)
    assert outputs["image"].shape == (3, 8, 8, 3) and outputs["states"].shape == outputs["estimates"].shape
    assert outputs["estimates"].shape == (3, 2, 8, 8, 3)
    nothing = stage.decode(frozen, jnp.zeros((1, 4, 4, 2)))  # the estimate of a network of zeros
    np.testing.assert_allclose(outputs["estimates"][0, 0], nothing[0], atol=1e-5)


def test_a_given_picture_is_its_reconstruction_at_strength_0():
    sampler = DiffusionSampler.from_config(latent_config())
    stage, frozen = opened(KL)
    params = {"denoiser": random_parameters(sampler.model)}
    images = np.asarray(pictures())
    mean = jax.jit(functools.partial(stage.mean, frozen))(images / np.float32(127.5) - 1)
    same = sampler(params, {}, frozen, sampler.request(image=images, strength=0.0), KEYS)["image"]
    np.testing.assert_allclose(same, jax.jit(functools.partial(stage.decode, frozen))(mean), atol=1e-5)

    with pytest.raises(UserError, match="pictures are 4 x 4 pixels, this run's are 8 x 8 pixels, 4 x 4 latents"):
        sampler.request(image=images[:, :4, :4])


@pytest.mark.parametrize("solver", ["ddpm", "dpm_solver_multistep"])
def test_inpainting_keeps_known_latents_and_pixels(solver, monkeypatch):
    sampler = DiffusionSampler.from_config(latent_config())
    stage, frozen = opened(KL)
    params = {"denoiser": random_parameters(sampler.model)}
    images, mask, drawn = np.asarray(pictures()), np.zeros((3, 8, 8), bool), np.zeros((3, 4, 4), bool)
    mask[:, 3:5, 5], drawn[:, 1:3, 2] = True, True  # two pixels, of one latent each
    decoded, decode = [], FirstStage.decode

    def recorded(stage, frozen, z):
        images = decode(stage, frozen, z)
        jax.debug.callback(lambda *both: decoded.append([np.asarray(each) for each in both]), z, images)
        return images

    monkeypatch.setattr(FirstStage, "decode", recorded)
    request = sampler.request(image=images, mask=mask, sampler=solver, steps=3)
    image = np.asarray(sampler(params, {}, frozen, request, KEYS)["image"])
    jax.effects_barrier()
    ((z, whole),) = decoded
    mean = np.asarray(jax.jit(functools.partial(stage.mean, frozen))(images / np.float32(127.5) - 1))
    np.testing.assert_allclose(z[~drawn], mean[~drawn], atol=1e-5)
    assert np.abs(z - mean)[drawn].min() > 1e-3
    np.testing.assert_array_equal(to_uint8(image)[~mask], images[~mask])
    np.testing.assert_allclose(image[mask], whole[mask], atol=1e-6)
    assert np.abs(to_uint8(whole)[~mask].astype(int) - images[~mask]).mean() > 10  # what is laid over


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"in_channels": 3},
            "the denoiser is of 4 x 4 x 3, and config.frozen.first_stage makes 4 x 4 x 2 of pictures of 8",
        ),
        ({"image_size": 8}, "the denoiser is of 8 x 8 x 2, and config.frozen.first_stage makes 4 x 4 x 2"),
        ({"process": {"clip": True}}, "config.process.clip cuts estimates off at -1 and 1"),
        ({"fields": {"name": "dvae"}}, "config.frozen.first_stage is a 'dvae'; it must be an autoencoder_kl"),
        ({"fields": {**KL, "multipliers": (1,) * 5}}, "config.data.image_size=8 is not a multiple of 16"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DiffusionSampler.from_config(latent_config(**changes))


def test_a_denoiser_of_latents_alone_says_what_it_lacks():
    config = latent_config(in_channels=4)
    config.frozen = ConfigDict()
    with pytest.raises(
        UserError, match="of latents of 4 channels; name what decodes them as config.frozen.first_stage"
    ):
        DiffusionSampler.from_config(config)
