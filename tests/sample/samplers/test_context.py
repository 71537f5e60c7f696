"""Captions that a frozen CLIP reads for a diffusion: a CLIP run, a run that depends on it, and its samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample.samplers.diffusion_program
from cli.errors import EXIT_OK, UserError
from configs.scenes import clip, ddpm_uvit
from sample.__main__ import main
from sample.samplers import create_sampler
from sample.trained import TrainedSampler
from train.loop import train
from weights.run import Run


@pytest.fixture(scope="module")
def clip_folder(debug_run):
    return debug_run("scenes/clip.py")


@pytest.fixture(scope="module")
def folder(clip_folder, scenes_dir, tmp_path_factory):
    """A debug run of the U-ViT that reads captions with the CLIP run."""
    reader = clip.get_config("debug")
    config = ddpm_uvit.get_config("debug")
    with config.unlocked():
        ddpm_uvit.read_with_clip(config, reader)
        config.data.data_dir = str(scenes_dir)
        config.frozen.clip.source = str(clip_folder)
        config.models.denoiser.update({"width": 16, "patch_size": 8})
        config.models.denoiser.context_length = reader.data.text_length
    workdir = tmp_path_factory.mktemp("context") / "uvit"
    assert train(config, workdir) == EXIT_OK
    return workdir


@pytest.fixture(scope="module")
def trained(folder):
    return TrainedSampler.open(folder, chunk=8)


def draw(trained, captions, seed=1, indices=(0, 0), **settings):
    return trained(trained.encode(captions), seed=seed, indices=indices, **settings)["image"]


def test_the_clip_is_that_of_its_run_and_stays_there(trained, folder, clip_folder):
    assert set(Run.open(folder).load().params) == {"denoiser"}
    jax.tree.map(
        np.testing.assert_array_equal, trained.frozen["clip"]["params"], Run.open(clip_folder).load().params["clip"]
    )
    assert trained.config.frozen.clip.step == 4  # the checkpoint of the CLIP that was the newest


def test_captions_are_framed_as_the_clip_reads_them(trained):
    start, *_, end = (token for token in trained.encode(["a small red circle"])["text"][0] if token)
    assert end == trained.sampler.text.model.text_end_id
    assert trained.sampler.text.blank[:3] == (start, end, 0)


def test_pictures_depend_on_what_the_clip_reads(trained):
    one, other = draw(trained, ["a small red circle", "a large blue star on black"])
    assert one.shape == (32, 32, 3)
    assert np.abs(one - other).max() > 1e-5
    without = draw(trained, ["a small red circle", "a large blue star on black"], guidance=0.0)
    np.testing.assert_allclose(without[0], without[1], atol=1e-5)
    blind = dataclasses.replace(trained, frozen=jax.tree.map(jnp.zeros_like, trained.frozen))
    one, other = draw(blind, ["a small red circle", "a large blue star on black"])
    np.testing.assert_array_equal(one, other)


def test_a_text_tower_alone_reads_the_same(trained):
    """As `config.frozen.text`, which a whole CLIP may be too; its own padding is in the blank caption."""
    config, whole = trained.config.copy_and_resolve_references(), trained.frozen["clip"]["params"]
    with config.unlocked():
        config.frozen = {"text": config.frozen.clip.copy_and_resolve_references()}
    named = dataclasses.replace(
        trained, sampler=create_sampler(config), frozen={"text": trained.frozen["clip"]}, config=config
    )
    captions = ["a small red circle", "a large blue star on black"]
    expected = draw(trained, captions)
    np.testing.assert_array_equal(draw(named, captions), expected)

    fields = {name: value for name, value in config.frozen.text.items() if name.startswith("text_")}
    with config.unlocked():
        config.frozen.text = {**fields, "name": "clip_text", "activation": config.frozen.text.activation}
    tree = {"text": {name: leaf for name, leaf in whole["text"].items() if name != "projection"}}
    alone = dataclasses.replace(
        trained, sampler=create_sampler(config), frozen={"text": {"params": tree, "variables": {}}}, config=config
    )
    np.testing.assert_allclose(draw(alone, captions), expected, atol=1e-5)
    assert alone.sampler.text.blank == trained.sampler.text.blank
    with config.unlocked():
        config.frozen.text.text_pad_id = (end := config.frozen.text.text_end_id)
    assert create_sampler(config).text.blank[1:] == (end,) * (config.data.text_length - 1)
    with config.unlocked():
        config.frozen.text.text_width = 64
    with pytest.raises(UserError, match="width 64"):
        create_sampler(config)


def test_prompts_seeds_and_guidance_compile_nothing_new(trained):
    draw(trained, ["a small red circle", "a blue star"], guidance=2.0)
    programs = sample.samplers.diffusion_program.draw._cache_size()
    draw(trained, ["a green cross", "a red star"], seed=7, indices=(3, 9), guidance=5.0, rescale=0.5)
    draw(trained, ["a green cross"], seed=7, indices=(3,), guidance=1.5)
    assert sample.samplers.diffusion_program.draw._cache_size() == programs


def test_the_command_draws_with_it(folder, tmp_path):
    main([f"--run={folder}", "--prompt=a red circle", "--num=2", "--steps=1", f"--out={tmp_path}/grid.png"])
    assert (tmp_path / "grid.png").is_file()
