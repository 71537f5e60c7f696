"""Whole runs that start from, or are built on, a pretrained folder."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from configs.common import get_defaults
from models import create_model
from sample.trained import TrainedSampler
from train.loop import train
from train.state import create_state
from train.transfer import initialize_parts
from weights.pretrained import write_pretrained
from weights.run import Run
from weights.sources import Part, load_part, random_part, resolve_frozen

from ..models.random_parameters import random_parameters

ROOT = Path(__file__).resolve().parents[2]


def config(scenes_dir, name, *overrides):
    return load_config(
        [f"--config={ROOT}/configs/scenes/{name}:debug", f"--config.data.data_dir={scenes_dir}", *overrides]
    )


def write_stage(folder, model, seed: int):
    """A pretrained folder of random weights; returns them."""
    part = Part(model, **jax.jit(lambda: random_part(model, seed).trees())())
    variables = {"dvae": part.variables} if part.variables else {}
    config = {"objective": "dvae", "models": {"dvae": model}}
    write_pretrained(folder, config, {"dvae": part.params}, variables, provenance={"format": "made up"})
    return part.params


def assert_same_trees(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_a_run_is_built_on_a_pretrained_stage_and_on_no_other(scenes_dir, tmp_path):
    model = config(scenes_dir, "dvae.py").models.dvae.to_dict()
    params = write_stage(tmp_path / "dvae", model, seed=0)
    settings = ("dalle.py", f"--config.frozen.dvae.source={tmp_path}/dvae")
    assert train(config(scenes_dir, *settings, "--config.steps=2"), tmp_path / "run") == EXIT_OK
    assert_same_trees(TrainedSampler.open(tmp_path / "run", chunk=2).frozen["dvae"]["params"], params)
    shutil.rmtree(tmp_path / "dvae")
    write_stage(tmp_path / "dvae", model, seed=1)
    with pytest.raises(UserError, match="started with another config .frozen.dvae.run"):
        train(config(scenes_dir, *settings, "--config.steps=3"), tmp_path / "run")
    shutil.rmtree(tmp_path / "dvae")
    write_stage(tmp_path / "dvae", model, seed=0)
    assert train(config(scenes_dir, *settings, "--config.steps=3"), tmp_path / "run") == EXIT_OK


@pytest.mark.slow
def test_fine_tuning_starts_from_a_pretrained_folder(scenes_dir, tmp_path):
    params = write_stage(tmp_path / "dvae", config(scenes_dir, "dvae.py").models.dvae.to_dict(), seed=3)
    settings = (f"--config.initialize.dvae.source={tmp_path}/dvae", "--config.optimizer.schedule.peak=0.0")
    train(config(scenes_dir, "dvae.py", *settings, "--config.steps=2"), tmp_path / "run")
    # With a learning rate of zero, what it started from is what it has.
    assert_same_trees(Run.open(tmp_path / "run").load(ema=False).params["dvae"], params)


@pytest.mark.slow
def test_a_clip_goes_on_at_another_resolution_and_nothing_else_may_differ(scenes_dir, tmp_path):
    wanted = config(scenes_dir, "clip.py").models.clip.to_dict()
    model = {**wanted, "image_size": 16}
    part = Part(model, **jax.jit(lambda: random_part(model, 0).trees())())
    converted = {"objective": "clip", "models": {"clip": part.model}}
    write_pretrained(tmp_path / "clip", converted, {"clip": part.params}, {}, provenance={"format": "made up"})
    settings = (f"--config.initialize.clip.source={tmp_path}/clip", "--config.steps=2")
    still = (*settings, "--config.optimizer.schedule.peak=0.0")
    assert train(config(scenes_dir, "clip.py", *still), tmp_path / "run") == EXIT_OK
    params = Run.open(tmp_path / "run").load(ema=False).params["clip"]
    assert_same_trees(params["text"], part.params["text"])
    assert params["image"]["position"]["embedding"].shape == (65, 32)
    np.testing.assert_array_equal(
        params["image"]["position"]["embedding"][0], part.params["image"]["position"]["embedding"][0]
    )
    with pytest.raises(UserError, match="activation: 'quick_gelu', not 'gelu'"):
        train(config(scenes_dir, "clip.py", *settings, "--config.models.clip.activation=gelu"), tmp_path / "other")


def test_a_unet_goes_on_with_larger_pictures(tmp_path):
    model = {"name": "unet", "image_size": 4, "in_channels": 2, "width": 4, "multipliers": (1,), "blocks": 1}
    model |= {"attention_levels": (), "heads": 1, "groups": 2}
    trained, new = (Part(model, **jax.jit(lambda seed=seed: random_part(model, seed).trees())()) for seed in (0, 1))
    described = {"objective": "diffusion", "models": {"denoiser": model}}
    write_pretrained(tmp_path / "small", described, {"denoiser": trained.params}, {}, provenance={})
    run = get_defaults()
    run.models.denoiser = ConfigDict({**model, "image_size": 8})
    run.initialize.denoiser = ConfigDict({"source": str(tmp_path / "small"), "part": "denoiser"})
    state = create_state({"denoiser": new.params}, {}, {}, averaged={})
    assert_same_trees(initialize_parts(run, state, lambda params: {}).params["denoiser"], trained.params)
    run.models.denoiser.norm_epsilon = 1e-6
    with pytest.raises(
        UserError, match="is another network than config.models.denoiser: norm_epsilon: 1e-05, not 1e-06"
    ):
        initialize_parts(run, state, lambda params: {})


def test_a_denoiser_goes_on_in_its_own_latents_or_with_a_warning(tmp_path, capsys, monkeypatch):
    stage = {"name": "autoencoder_kl", "image_size": 8, "width": 4, "multipliers": (1,), "blocks": 1, "groups": 2}
    stage |= {"latent_channels": 2, "latent_scale": 0.5}
    model = {"name": "point_denoiser", "width": 4, "depth": 1}
    params = random_parameters(create_model(**model))
    for name, seed in (("own", 0), ("copy", 0), ("other", 1)):
        trees = {"autoencoder": random_parameters(create_model(**stage), seed)}
        described = {"objective": "autoencoder", "models": {"autoencoder": stage}}
        write_pretrained(tmp_path / name, described, trees, {}, provenance={"format": "made up", "name": name})
    frozen = {**stage, "source": str(tmp_path / "own"), "part": "autoencoder", "step": 0}
    described = {"objective": "diffusion", "models": {"denoiser": model}, "frozen": {"first_stage": frozen}}
    write_pretrained(tmp_path / "run", described, {"denoiser": params}, {}, provenance={})

    def warned(source="own", of=None, **fields) -> str:
        run = get_defaults()
        run.models.denoiser = ConfigDict(model)
        run.initialize.denoiser = ConfigDict({"source": str(tmp_path / (of or "run")), "part": "denoiser"})
        if source:
            run.frozen.first_stage = ConfigDict({**frozen, "source": str(tmp_path / source), **fields})
        resolve_frozen(run)
        initialize_parts(run, create_state({"denoiser": params}, {}, {}, averaged={}), lambda params: {})
        return capsys.readouterr().out

    assert warned() == warned("copy") == ""
    # As scripts.convert --to=pretrained writes what lies beside a denoiser.
    whole = {**stage, "source": ".", "part": "first_stage", "step": 0, "run": ""}
    trees = {"denoiser": params, "first_stage": random_parameters(create_model(**stage), 0)}
    described = {"models": {"denoiser": model}, "frozen": {"first_stage": whole}}
    write_pretrained(tmp_path / "whole", described, trees, {}, provenance={})
    assert warned("whole", of="whole", part="first_stage") == warned("copy", of="whole") == ""
    assert ": other weights; take" in warned("other", of="whole")
    said = warned("other")
    assert said.startswith("warning: config.initialize.denoiser: ") and said.count("\n") == 1
    assert f"first_stage of {tmp_path}/own at step 0" in said
    assert f"config.frozen.first_stage is of {tmp_path}/other at step 0: other weights" in said
    assert "latent_scale: 0.5, not 0.25" in warned(latent_scale=0.25)
    # Each process reads what is compared, as Orbax's are to read together; the first one speaks.
    read = []
    monkeypatch.setattr("weights.starts.load_part", lambda entry, *given: read.append(entry) or load_part(entry))
    assert "latent_scale: 0.5, not 0.25" in warned("other", latent_scale=0.25) and len(read) == 1  # the denoiser
    with monkeypatch.context() as another:
        another.setattr("train.transfer.is_first", lambda: False)
        assert warned("other") == "" and len(read) == 4
    shutil.rmtree(tmp_path / "own")
    assert "they cannot be compared, as the source" in warned("copy")


def test_a_unidiffuser_goes_on_in_its_own_caption_latents_or_with_a_warning(tmp_path, capsys):
    """What writes captions of those latents may be another one."""
    captioner = {"name": "captioner", "text_vocab_size": 9, "length": 4, "width": 4, "depth": 1, "heads": 1}
    captioner |= {"feature_width": 3, "prefix_length": 2, "mapper": "bottleneck", "latent_width": 2}
    model = {"name": "point_denoiser", "width": 4, "depth": 1}
    params = random_parameters(create_model(**model))
    own = random_parameters(create_model(**captioner))
    for name, module in (("own", ""), ("writes", "language"), ("other", "encode_prefix")):
        moved = {**own, **({module: jax.tree.map(lambda leaf: leaf + 0.1, own[module])} if module else {})}
        fields = {**captioner, "activation": "gelu" if name == "writes" else "gelu_tanh"}
        described = {"objective": "captioner", "models": {"captioner": fields}}
        write_pretrained(tmp_path / name, described, {"captioner": moved}, {}, provenance={"name": name})
    entries = {
        name: {**captioner, "source": str(tmp_path / name), "part": "captioner", "step": 0}
        for name in ("own", "writes", "other")
    }
    described = {"models": {"unidiffuser": model}, "frozen": {"captioner": entries["own"]}}
    write_pretrained(tmp_path / "run", described, {"unidiffuser": params}, {}, provenance={})
    said = {}
    for name, entry in entries.items():
        run = get_defaults()
        run.models.unidiffuser = ConfigDict(model)
        run.initialize.unidiffuser = ConfigDict({"source": str(tmp_path / "run"), "part": "unidiffuser"})
        run.frozen.captioner = ConfigDict(entry)
        resolve_frozen(run)
        initialize_parts(run, create_state({"unidiffuser": params}, {}, {}, averaged={}), lambda params: {})
        said[name] = capsys.readouterr().out
    assert said["own"] == said["writes"] == ""
    assert f"config.frozen.captioner is of {tmp_path}/other at step 0: other weights" in said["other"]


@pytest.mark.slow
def test_a_first_stage_of_other_sizes_and_scale_is_trained_further(scenes_dir, tmp_path):
    """As those of Stable Diffusion come in: made for 256 pixels, latents times 0.18215."""
    model = config(scenes_dir, "autoencoder.py").models.autoencoder.to_dict()
    part = Part(model, **jax.jit(lambda: random_part(model, 3).trees())())
    described = {
        "objective": "autoencoder",
        "models": {"autoencoder": {**model, "image_size": 256, "latent_scale": 0.2}},
    }
    write_pretrained(tmp_path / "stage", described, {"autoencoder": part.params}, {}, provenance={"format": "made up"})
    settings = (f"--config.initialize.autoencoder.source={tmp_path}/stage", "--config.optimizer.schedule.peak=0.0")
    assert train(config(scenes_dir, "autoencoder.py", *settings, "--config.steps=2"), tmp_path / "run") == EXIT_OK
    weights = Run.open(tmp_path / "run").load(ema=False)
    assert_same_trees(weights.params["autoencoder"], part.params)
    assert weights.variables["autoencoder"]["statistics"]["latents"]["count"] == 300 // 8


def test_scales_that_a_source_measured_and_a_new_run_gives_are_said(scenes_dir, debug_run, capsys):
    """Starting with other factors than the weights were trained with would spoil them."""
    folder = debug_run("scenes/unidiffuser.py")
    trained = Run.open(folder).load(ema=False)
    start = f"--config.initialize.unidiffuser.source={folder}"
    given = config(scenes_dir, "unidiffuser.py", start, "--config.scales.clip=1.0", "--config.scales.text=1.0")
    measured = config(scenes_dir, "unidiffuser.py", start)
    capsys.readouterr()  # of training
    for run, variables in ((given, {}), (measured, jax.tree.map(jnp.zeros_like, trained.variables))):
        state = create_state(trained.params, variables, {}, averaged={})
        begun = initialize_parts(run, state, lambda params: {}).variables
        said = capsys.readouterr().out
        assert said.count("warning:") == (not variables), said
        if variables:
            assert_same_trees(begun, trained.variables)
        else:
            assert f"{folder} brings along what it measured (statistics/clip" in said and "config.scales" in said
