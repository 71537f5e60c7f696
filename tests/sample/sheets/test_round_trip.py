"""Round trips, and evaluation, of a run whose config has a mode of its own."""

import json

import numpy as np
import pytest

from cli.config import load_config, to_json
from data.pipeline import load_tokenizer
from evaluation.evaluate import evaluate_run
from sample.conditions import Order, make_conditions
from sample.samplers import create_sampler
from sample.sheets.round_trip import draw_round_trip
from sample.trained import TrainedSampler
from weights.run import Run, RunWeights


class Blank(TrainedSampler):
    """A run whose requests are made, and answered with nothing."""

    def __call__(self, rows, *, seed, indices, **settings):
        modes = self.sampler.request(**rows, **settings)["modes"]
        count = len(indices)
        made = {"text_to_image": ("image",), "image_to_text": ("text",), "joint": ("image", "text")}
        blank = {"image": np.zeros((count, 32, 32, 3), np.float32), "text": np.zeros((count, 4), np.int32)}
        return {name: blank[name] for mode in modes for name in made[mode]}


@pytest.fixture
def joint_run(scenes_dir, tmp_path):
    """A UniDiffuser that draws pairs unless told otherwise."""
    config = load_config(
        ["--config=configs/scenes/unidiffuser.py:debug", f"--config.data.data_dir={scenes_dir}"]
        + ["--config.sample.mode=joint"]
    )
    tokenizer = load_tokenizer(config.data)
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "provenance.json").write_text(json.dumps({}))
    tokenizer.save(tmp_path / "tokenizer.json")
    weights = RunWeights({}, {}, 0, False)
    return Blank(Run(tmp_path, config), config, create_sampler(config), weights, {}, tokenizer, 64)


def test_legs_follow_from_what_they_read(joint_run):
    drawn = draw_round_trip(joint_run, Order(make_conditions(["a red circle"])), num=2, legs=3)
    assert drawn.images.shape == (2, 32, 32, 3) and len(drawn.records[0]["captions"]) == 1
    assert drawn.settings["mode"] == ""


def test_metrics_follow_from_what_they_tell(joint_run):
    joint_run.check_request({})
    records = evaluate_run(joint_run, (), ("validation",), 4, 0, {})
    assert [record["metric"] for record in records] == ["caption_accuracy", "written_captions", "agreement"]
