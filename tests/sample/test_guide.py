"""Which runs may guide which: their networks must learn the same latents, and be told the same of the same captions."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import models
from cli.errors import UserError
from sample.guide import check_guide

from ..models.random_parameters import random_parameters

STAGE = {"name": "autoencoder_kl", "image_size": 8, "width": 4, "multipliers": (1, 1), "blocks": 1, "groups": 2}
STAGE |= {"latent_channels": 2}
SCALED = {**STAGE, "latent_scale": 0.5, "latent_shift": 0.25}
MEASURED = {"statistics": {"latents": {"mean": np.float32(0.25), "square": np.float32(4), "count": np.float32(3)}}}
CLIP = {"name": "clip_text", "text_vocab_size": 20, "text_length": 4, "text_end_id": 19, "text_width": 8}
CLIP |= {"text_layers": 1, "text_heads": 2}


@pytest.fixture(scope="module")
def weights():
    """Parameters of the first stage and of the text tower, the same each time."""
    return {
        name: random_parameters(models.create_model(**fields)) for name, fields in (("stage", STAGE), ("clip", CLIP))
    }


@pytest.fixture
def opened(weights, tmp_path):
    """Makes an open run of a denoiser, with {name: (fields, parameters, variables)} frozen; nothing is compiled."""

    def make(name, frozen=(), *, denoiser=0.0, tokenizer="words", blank=(18, 19, 0, 0)):
        frozen, folder = dict(frozen), tmp_path / name
        folder.mkdir()
        if tokenizer:
            (folder / "tokenizer.json").write_text(tokenizer)
        text = SimpleNamespace(frozen="text" in frozen, part="text", blank=blank) if blank else None
        return SimpleNamespace(
            run=SimpleNamespace(folder=folder),
            config=ConfigDict({"frozen": {part: fields for part, (fields, *_) in frozen.items()}}),
            frozen={part: {"params": params, "variables": more} for part, (_, params, more) in frozen.items()},
            sampler=SimpleNamespace(model="denoiser", text=text),
            weights=SimpleNamespace(params={"denoiser": {"kernel": jnp.full(3, denoiser)}}),
        )

    return make


def changed(params, part, by=0.01):
    """Parameters with those of one module moved."""
    return {**params, part: jax.tree.map(lambda leaf: leaf + by, params[part])}


def stage(params, fields=SCALED, variables=None):
    return {"first_stage": (fields, params, variables or {})}


def test_what_makes_other_latents_is_refused_and_named(opened, weights):
    own = weights["stage"]
    run = opened("run", stage(own))
    half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16).astype(np.float32), own)
    for name, params in (("same", own), ("decoder", changed(own, "decoder")), ("half", half)):
        check_guide(run, opened(name, stage(params), denoiser=1.0))
    for name, params, fields, said in (
        ("encoder", changed(own, "encoder"), {}, "other weights"),
        ("quant", changed(own, "quant"), {}, "other weights"),
        ("scale", own, {"latent_scale": 0.25}, "latent_scale: 0.25, not 0.5"),
        ("shift", own, {"latent_shift": 0.0}, "latent_shift: 0.0, not 0.25"),
        ("patches", own, {"patch_size": 2}, "patch_size: 2, not 1"),
    ):
        with pytest.raises(UserError, match=f"{name} learned latents of another first stage than .*run: {said}"):
            check_guide(run, opened(name, stage(params, {**SCALED, **fields}), denoiser=1.0))
    with pytest.raises(UserError, match="pixels learned pixels, and .*run learned latents"):
        check_guide(run, opened("pixels", denoiser=1.0))


def test_latents_that_were_measured_otherwise_are_others(opened, weights):
    other = {"statistics": {"latents": {**MEASURED["statistics"]["latents"], "mean": np.float32(0.5)}}}
    run = opened("run", stage(weights["stage"], STAGE, MEASURED))
    check_guide(run, opened("same", stage(weights["stage"], STAGE, MEASURED), denoiser=1.0))
    with pytest.raises(UserError, match="latents of another first stage than .*run: other weights"):
        check_guide(run, opened("other", stage(weights["stage"], STAGE, other), denoiser=1.0))
    # What was measured counts no more where the config says the scale.
    run = opened("said", stage(weights["stage"], SCALED, MEASURED))
    check_guide(run, opened("said too", stage(weights["stage"], SCALED, other), denoiser=1.0))


def test_captions_have_one_tokenizer_and_are_read_by_one_frozen_network(opened, weights):
    tower = {"text": (CLIP, weights["clip"], {})}
    run = opened("run", tower)
    check_guide(run, opened("same", tower, denoiser=1.0))
    check_guide(run, opened("tuned", denoiser=1.0))  # whose network that reads captions was trained with it
    for name, more, said in (
        ("tokenizer", {"tokenizer": "others"}, "reads captions with another tokenizer than"),
        ("none", {"tokenizer": ""}, "has no tokenizer.json that would say which ids it reads"),
        ("ends", {"blank": (18, 19, 19, 19)}, "reads captions that are ended or filled up otherwise"),
    ):
        with pytest.raises(UserError, match=f"{name} {said}"):
            check_guide(run, opened(name, tower, denoiser=1.0, **more))
    for name, fields, params in (
        ("other weights", {}, jax.tree.map(lambda leaf: 2 * leaf, weights["clip"])),
        ("activation", {"activation": "gelu"}, weights["clip"]),
    ):
        with pytest.raises(UserError, match=f"is told captions by another frozen network than .*run: {name}"):
            check_guide(run, opened(name, {"text": ({**CLIP, **fields}, params, {})}, denoiser=1.0))


def test_the_same_weights_lead_nowhere(opened):
    run = opened("run", blank=None)
    with pytest.raises(UserError, match="copy has the very weights of .*run, so it has no effect"):
        check_guide(run, opened("copy", blank=None))
    check_guide(run, opened("earlier", blank=None, denoiser=1e-6))
