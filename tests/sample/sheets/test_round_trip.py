"""Round trips, and evaluation, of a run whose config has a mode of its own."""

import dataclasses
import json

import numpy as np
import pytest

from cli.config import load_config, to_json
from data.pipeline import load_tokenizer
from evaluation.caption_accuracy import captioned_pictures
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


class Witness(TrainedSampler):
    """Draws and describes the dataset's pictures without fault, but takes the first for the second."""

    def __call__(self, rows, *, seed, indices, **settings):
        known = captioned_pictures(self.config, "validation", len(indices))
        if "text" in rows:
            drawn = known.images[[known.captions.index(text) for text in self.decode(rows["text"])]]
            return {"image": drawn.astype(np.float32) / 127.5 - 1}
        errors = np.abs(rows["image"][:, None].astype(int) - known.images).sum((2, 3, 4))
        return self.encode([known.captions[max(place, 1)] for place in np.argmin(errors, axis=1)])


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
    assert [record["metric"] for record in records] == [
        "caption_accuracy",
        "written_captions",
        "agreement",
        "round_trip",
    ]


def test_a_trip_is_of_what_the_first_caption_says(joint_run):
    witness = Witness(**{field.name: getattr(joint_run, field.name) for field in dataclasses.fields(joint_run)})
    (record,) = evaluate_run(witness, ("round_trip",), ("validation",), 4, 0, {})
    assert record["values"] == {"all": 0.75, "leg_1": 1.0, "leg_2": 0.75} and record["counted"]["all"] == 4
