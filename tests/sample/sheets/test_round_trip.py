"""Round trips, and evaluation, of a run whose config has a mode of its own; and settings that a mode does not read."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cli.config import load_config, to_json
from cli.errors import UserError
from data.pipeline import load_tokenizer
from evaluation.caption_accuracy import captioned_pictures
from evaluation.evaluate import evaluate_run
from evaluation.sweep import evaluate_cells
from evaluation.tools import Tools
from sample.command import draw_samples
from sample.conditions import Order, make_conditions
from sample.files import write_files
from sample.samplers import create_sampler
from sample.sheets.axes import Axis
from sample.sheets.round_trip import draw_round_trip
from sample.sheets.sweep import make_cells, run_sweep
from sample.trained import TrainedSampler
from weights.run import Run, RunWeights


class Blank(TrainedSampler):
    """A run whose requests are made, and answered with nothing."""

    def __call__(self, rows, *, seed, indices, **settings):
        modes = self.sampler.request(**rows, **settings)["modes"]
        count = len(indices)
        made = {"text_to_image": ("image",), "image_to_text": ("text",), "joint": ("image", "text"), "text": ("text",)}
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


def test_a_trip_changes_no_picture(joint_run, tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "red.png")
    order = Order(make_conditions(images=[f"{tmp_path}/red.png"]), settings={"strength": 0.5})
    with pytest.raises(UserError, match="a round trip describes its pictures and changes none; leave --strength out"):
        draw_round_trip(joint_run, order, num=1, legs=2)


@pytest.mark.parametrize(
    ("prompts", "axis", "files"),
    [
        ([], Axis("mode", ("text", "joint")), [{"text_file"}, {"file", "text_file"}]),
        (["a red circle"], Axis("guidance", (1.0, 3.0)), [{"file"}, {"file"}]),
    ],
    ids=["of several modes", "of one that writes nothing"],
)
def test_each_record_of_a_sweep_has_what_its_own_cell_made(joint_run, tmp_path, prompts, axis, files):
    order = Order(make_conditions(prompts), settings={} if axis.name == "mode" else {"mode": ""})
    swept = run_sweep(joint_run, order, (axis,), 1, tmp_path / "grid.png")
    write_files(tmp_path / "files", swept)
    records = json.loads((tmp_path / "files" / "samples.json").read_text())["samples"]
    assert [{name for name in ("file", "text_file") if name in record} for record in records] == files
    assert all(
        (tmp_path / "files" / record[name]).is_file()
        for record, own in zip(records, files, strict=True)
        for name in own
    )


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


CAPTIONS = {"temperature", "top_k", "top_p", "beams", "length_penalty", "caption_length"}
KINDS = {"data_type"}  # of which the network tells none apart


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["a"], {"mode": "", "beams": 5}, "beams=5 has no effect, as mode text_to_image writes no caption; "),
        (["a"], {"mode": "text_to_image", "noise": "diffusers"}, "begins with no noise of a caption"),
        (["a"], {"mode": "", "unconditional": "empty", "guidance": 1.0}, "as guidance 1 means none"),
        ([], {"unconditional": "empty"}, "mode joint draws no picture of a caption"),
        ([], {"mode": "text", "guidance": 3.0}, "mode text is told nothing that guidance could lead to"),
    ],
)
def test_a_setting_that_the_mode_does_not_read_is_refused_before_anything_is_drawn(
    joint_run, monkeypatch, prompts, settings, message
):
    monkeypatch.delattr(Blank, "__call__")
    monkeypatch.delattr(TrainedSampler, "__call__")
    with pytest.raises(UserError, match=message):
        draw_samples(joint_run, Order(make_conditions(prompts), settings=settings), 1)


def test_settings_that_were_not_read_are_not_written_down(joint_run):
    drawn = draw_samples(joint_run, Order(make_conditions(["a"]), settings={"mode": "", "guidance": 1.0}), 1)
    assert joint_run.config.sample.keys() - drawn.settings.keys() == {*CAPTIONS, "noise", "unconditional", *KINDS}
    assert drawn.records[0]["file_of"] == "prompt" and "text_of" not in drawn.records[0]
    drawn = draw_samples(joint_run, Order(make_conditions()), 1)
    assert joint_run.config.sample.keys() - drawn.settings.keys() == {"unconditional", *KINDS}
    assert not {"file_of", "text_of"} & drawn.records[0].keys()


def test_one_leg_or_cell_that_reads_a_setting_is_enough(joint_run):
    begin = Order(make_conditions(["a"]), settings={"caption_length": 4})
    assert draw_round_trip(joint_run, begin, num=1, legs=2).settings["caption_length"] == 4
    with pytest.raises(UserError, match="caption_length=4 has no effect"):
        draw_round_trip(joint_run, begin, num=1, legs=1)
    order = Order(make_conditions(), settings={"guidance": 3.0})
    assert len(make_cells(joint_run, order, [Axis("mode", ("text", "joint"))])) == 2
    with pytest.raises(UserError, match=r"guidance=3.0 has no effect"):
        make_cells(joint_run, order, [Axis("mode", ("text", "image"))])


def evaluated(run, metrics, settings, axes=()):
    done = []
    evaluate_cells(run, lambda *_: run, axes, metrics, ("validation",), 4, 0, settings, Tools(), done)
    return done


def test_a_mode_may_be_named_that_the_metric_asks_for(joint_run):
    (named,) = evaluated(joint_run, ("agreement",), {"mode": "joint"})
    (plain,) = evaluated(joint_run, ("agreement",), {})
    assert named == plain and "mode" not in plain
    with pytest.raises(UserError, match="agreement asks the run for mode joint, and --mode=text is given; "):
        evaluated(joint_run, ("agreement",), {"mode": "text"})
    with pytest.raises(UserError, match="mode=text: agreement asks the run for mode joint"):
        evaluated(joint_run, ("agreement",), {}, (Axis("mode", ("joint", "text")),))
    with pytest.raises(UserError, match="caption_accuracy asks the run for mode text_to_image, and --mode=joint"):
        evaluated(joint_run, (), {"mode": "joint"})


def test_records_of_metrics_hold_what_they_were_computed_with(joint_run):
    drawn, written = evaluated(joint_run, ("caption_accuracy", "written_captions"), {"caption_length": 4})
    assert joint_run.config.sample.keys() - drawn.keys() == {*CAPTIONS, "noise", "mode", *KINDS}
    assert joint_run.config.sample.keys() - written.keys() == {"unconditional", "mode", *KINDS}
    assert written["caption_length"] == 4
    with pytest.raises(UserError, match="caption_length=4 has no effect, as mode text_to_image writes no caption"):
        evaluated(joint_run, ("caption_accuracy",), {"caption_length": 4})
