"""What captions are worth to a denoiser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.errors import UserError
from data.preprocess import TRANSFORMS, TransformPair, center_square
from data.records import RecordSource
from evaluation.__main__ import main
from evaluation.clip.metrics import ClipSettings
from evaluation.clip.reranking import ClipScorer
from evaluation.denoising import caption_loss
from evaluation.evaluate import evaluate_run
from evaluation.sweep import evaluate_cells
from evaluation.tools import Tools, check_tools
from sample.trained import TrainedSampler

NUM = 24


@pytest.fixture(scope="module")
def diffusion(debug_run):
    return TrainedSampler.open(debug_run("scenes/ddpm_uvit.py"), chunk=16)


def with_params(trained: TrainedSampler, part: str, change) -> TrainedSampler:
    """The run with the arrays of a part changed."""
    params = {**trained.weights.params, part: jax.tree.map(change, trained.weights.params[part])}
    return dataclasses.replace(trained, weights=dataclasses.replace(trained.weights, params=params))


def test_every_condition_sees_the_same_noise(diffusion):
    """A text encoder that says the same of every caption leaves nothing to tell the three apart."""
    deaf = with_params(diffusion, "text", jnp.zeros_like)
    values = caption_loss(deaf, "validation", NUM, seed=3)["values"]
    assert values["mse"] == values["mse_shuffled"] == values["mse_blank"]
    assert values["own_better"] == 0
    values = caption_loss(diffusion, "validation", NUM, seed=3)["values"]
    assert len({values["mse"], values["mse_shuffled"], values["mse_blank"]}) == 3


def test_a_network_that_says_nothing_has_the_error_of_the_target_itself(diffusion):
    """Its estimate of the data is gray, so its error is the data's own."""
    assert diffusion.sampler.process.prediction == "x0"
    silent = with_params(diffusion, "denoiser", jnp.zeros_like)
    result = caption_loss(silent, "validation", NUM, seed=0)
    data = diffusion.config.data
    source = RecordSource(data.dataset, "validation", data.data_dir)
    images = np.stack([source[index]["image"] for index in range(NUM)]) / 127.5 - 1
    assert result["values"]["mse"] == pytest.approx(np.mean(np.square(images)), rel=1e-5)
    assert result["counted"] == {"own_better": NUM}


def test_pictures_are_cut_as_the_config_s_evaluation_cuts_them(diffusion, monkeypatch):
    cut = TransformPair(center_square, lambda image, size, rng: np.full_like(center_square(image, size), 255))
    monkeypatch.setitem(TRANSFORMS, diffusion.config.data.transform, cut)
    silent = with_params(diffusion, "denoiser", jnp.zeros_like)
    assert caption_loss(silent, "validation", NUM, seed=0)["values"]["mse"] == pytest.approx(1, rel=1e-5)


def test_the_noise_of_a_record_depends_on_the_seed_alone(diffusion):
    first = caption_loss(diffusion, "validation", NUM, seed=1)["values"]
    assert first == caption_loss(diffusion, "validation", NUM, seed=1)["values"]
    assert first["mse"] != caption_loss(diffusion, "validation", NUM, seed=2)["values"]["mse"]


def test_one_picture_has_no_other_caption(diffusion):
    with pytest.raises(UserError, match="--num must be at least 2, not 1"):
        caption_loss(diffusion, "validation", 1, seed=0)


def test_what_is_given_beside_the_run_and_read_by_no_metric_is_refused(diffusion):
    guided = dataclasses.replace(diffusion, guide={"guide_run": "worse", "guide_step": 1, "guide_ema": False})
    given = [
        (guided, Tools(), "--guide_run has no effect on caption_loss; leave it out$"),
        (diffusion, Tools(scorer=object.__new__(ClipScorer)), "--clip has no effect on .*; --metrics of clip_score, "),
        (diffusion, Tools(clip=ClipSettings(label="kind")), "--label has no effect on caption_loss; leave it out$"),
    ]
    for trained, tools, message in given:
        with pytest.raises(UserError, match=message):
            evaluate_cells(trained, lambda *_: diffusion, (), ("caption_loss",), ("validation",), 4, 0, {}, tools, [])
        with pytest.raises(UserError, match=message):
            evaluate_run(trained, ("caption_loss",), ("validation",), 4, 0, {}, tools)
    check_tools(guided, ("caption_loss", "caption_accuracy"), ("caption_accuracy",), Tools())
    for option, tool in (("num_real=5", "features"), ("candidates=2", "clip")):
        with pytest.raises(UserError, match=f"--{option.partition('=')[0]} is of --{tool}; give that, or leave it out"):
            main(["--run=none", f"--{option}"])
