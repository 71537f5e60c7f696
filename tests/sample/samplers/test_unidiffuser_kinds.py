"""A UniDiffuser that tells kinds of data apart is told the kind in every mode; one that does not refuses it."""

import functools

import jax
import numpy as np
import pytest

from cli.config import load_config, to_json
from cli.errors import UserError
from sample.samplers import create_sampler
from sample.samplers.unidiffuser import UniDiffuserSampler
from sample.samplers.unidiffuser_modes import MODES
from sample.trained import TrainedSampler
from weights.run import CONFIG, PROVENANCE, Run, RunWeights
from weights.sources import load_frozen

from ...models.random_parameters import random_parameters

QUICK = ("sample.steps=1", "sample.caption_length=2", "scales.clip=1.0", "scales.text=1.0")
VERSION_1 = (*QUICK, "models.unidiffuser.data_types=2")


def read(*overrides):
    return load_config(["--config=configs/scenes/unidiffuser.py:debug", *(f"--config.{each}" for each in overrides)])


class Mute(UniDiffuserSampler):
    """Gives latents of captions in place of words, which are the same for many of them."""

    def write(self, frozen, latents, program, numbers, keys):
        return latents["text"]


@functools.cache
def opened():
    """(sampler, parameters, frozen parts) of a run that learned kind 0."""
    config = read(*VERSION_1, "data.data_type=0")
    sampler = Mute.from_config(config)
    return sampler, {"unidiffuser": random_parameters(sampler.model)}, load_frozen(config)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_tells_the_kind(mode):
    sampler, params, frozen = opened()
    rows = {}
    if MODES[mode] == "text":
        rows["text"] = np.zeros((1, 24), np.int32)
        rows["text"][:, :3] = [351, 5, 352]
    if MODES[mode] == "image":
        rows["image"] = np.zeros((1, 32, 32, 3), np.uint8)

    def draw(**settings):
        request = sampler.request(**rows, mode=mode, **settings)
        return sampler(params, {}, frozen, request, jax.random.split(jax.random.key(0), 1))

    usual, web, other = draw(), draw(data_type=0), draw(data_type=1)
    assert set(usual) == {"image": {"image"}, "text": {"text"}}.get(mode.split("_to_")[-1], {"image", "text"})
    for name, value in usual.items():
        np.testing.assert_array_equal(value, web[name])
        assert np.any(np.asarray(web[name]) != np.asarray(other[name]))


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (VERSION_1, 1),
        ((*VERSION_1, "data.data_type=0"), 0),
        ((*VERSION_1, "data.data_type=0", "sample.data_type=1"), 1),
        (QUICK, -1),
    ],
)
def test_the_usual_kind_is_the_one_that_was_learned(overrides, kind):
    sampler = create_sampler(read(*overrides))
    assert sampler.request()["data_type"] == sampler.settings["data_type"] == kind


def test_kinds_that_a_network_does_not_know_are_one_line():
    sampler, *_ = opened()
    with pytest.raises(UserError, match="data_type=2 is unknown; this UniDiffuser's kinds of data are 0, 1$"):
        sampler.request(data_type=2)
    with pytest.raises(UserError, match="data_type=0 is of a UniDiffuser that tells kinds of data apart, and this one"):
        create_sampler(read(*QUICK)).request(data_type=0)


def test_what_is_said_of_a_picture_is_the_kind_that_it_was_drawn_as(tmp_path, monkeypatch):
    """The config's -1 stands for the kind that the run learned; nobody says it of a picture."""
    (tmp_path / CONFIG).write_text(to_json(read(*VERSION_1, "data.data_type=0")))
    (tmp_path / PROVENANCE).write_text("{}")
    monkeypatch.setattr("sample.trained.load_frozen", lambda _: {})
    monkeypatch.setattr(Run, "load", lambda *_: RunWeights({}, {}, 0, False))
    trained = TrainedSampler.open(str(tmp_path))
    assert trained.describe(0, {})["data_type"] == 0 and trained.describe(0, {"data_type": 1})["data_type"] == 1
    with pytest.raises(UserError, match="data_type=-1 is unknown; this UniDiffuser's kinds of data are 0, 1$"):
        trained.sampler.request(data_type=-1)
