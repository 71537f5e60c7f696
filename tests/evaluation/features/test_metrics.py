"""Metrics of features on real (tiny) runs: what is compared, recorded and refused. A stand-in extracts the features."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cli.errors import UserError
from configs.paper import ddpm, uvit
from data.records import RecordSource
from evaluation.evaluate import evaluate_run
from evaluation.features.distances import feature_statistics, frechet_distance
from evaluation.features.extractors import Classifier, FeatureExtractor
from evaluation.features.metrics import FEATURE_METRICS, FeatureSettings, draw_pictures
from evaluation.features.reference import FeatureStore
from evaluation.records import format_table, write_records
from evaluation.report import Section, write_report
from evaluation.tools import Tools
from sample.trained import TrainedSampler

ROOT = Path(__file__).resolve().parents[3]


class Colors:
    """Features a person can check: mean and deviation of each channel; logits are the means."""

    resize = "none"

    def __init__(self, identity="colors/none/1", metrics=FEATURE_METRICS):
        self.identity, self.metrics, self.seen = identity, metrics, 0

    def features(self, images):
        self.seen += len(images)
        pixels = images.reshape(len(images), -1, 3) / 255.0
        return np.concatenate([pixels.mean(1), pixels.std(1)], axis=1)

    def features_and_logits(self, images):
        return self.features(images), images.reshape(len(images), -1, 3).mean(1) / 10.0


class ColorsAlone:
    """The same without logits."""

    resize, identity, metrics = "none", "colors-alone/none/1", ("fid",)
    features = Colors.features
    seen = 0


def settings(tmp_path, extractor=None, **changes) -> Tools:
    chosen = {"kid_subset_size": 0, **changes}
    return Tools(features=FeatureSettings(extractor or Colors(), FeatureStore(tmp_path / "features"), **chosen))


def test_the_stand_ins_are_extractors():
    assert isinstance(Colors(), Classifier) and isinstance(ColorsAlone(), FeatureExtractor)
    assert not isinstance(ColorsAlone(), Classifier)


def test_every_metric_of_a_run_that_draws(stage2, tmp_path):
    chosen = settings(tmp_path, num_real=40)
    records = evaluate_run(stage2, FEATURE_METRICS, ["validation"], 20, 5, {"guidance": 2.0}, chosen)
    assert [record["metric"] for record in records] == list(FEATURE_METRICS)
    expected = {"num": 20, "num_generated": 20, "features": "colors/none/1", "resize": "none", "step": 4, "ema": True}
    expected |= {"seed": 5, "guidance": 2.0, "temperature": 0.5, "dataset": "scenes/single32/1.0.0"}
    for record in records:
        assert {key: record[key] for key in expected} == expected
        assert record.get("num_real") == (None if record["metric"] == "inception_score" else 40)
        assert all(np.isfinite(value) for value in record["values"].values())
    assert chosen.features.extractor.seen == 20 + 40  # each picture once for all metrics
    assert records[1]["subset_size"] == 0 and records[4]["counted"] == {"precision": 20, "recall": 40}


def test_values_are_those_of_the_run_s_pictures_and_the_split_s(stage2, scenes_dir, tmp_path):
    fid = evaluate_run(stage2, ["fid"], ["validation"], 20, 5, {}, settings(tmp_path))[0]["values"]["fid"]
    source = RecordSource("scenes/single32", "validation", str(scenes_dir))
    real = np.stack([source[index]["image"] for index in range(20)])
    captions = [source[index]["captions"][0] for index in range(20)]
    drawn = stage2(stage2.encode(captions), seed=5, indices=range(20))["image"]
    drawn = np.clip(np.rint((drawn + 1) * 127.5), 0, 255).astype(np.uint8)
    pictures = np.concatenate(list(draw_pictures(stage2, "validation", 20, 5, {})))
    np.testing.assert_array_equal(pictures, drawn)
    expected = frechet_distance(*(feature_statistics(Colors().features(images)) for images in (drawn, real)))
    assert fid == pytest.approx(expected, rel=1e-9) and fid > 0


def test_reconstructions_are_compared_with_their_pictures(stage1, tmp_path):
    records = evaluate_run(
        stage1, ["fid", "precision_recall"], ["validation", "held_out"], 20, 0, {}, settings(tmp_path)
    )
    assert [(record["metric"], record["split"]) for record in records] == [
        ("fid", "validation"),
        ("precision_recall", "validation"),
        ("fid", "held_out"),
        ("precision_recall", "held_out"),
    ]
    perfect = TrainedSampler(**{**vars(stage1), "sampler": Copying()})
    assert evaluate_run(perfect, ["fid"], ["validation"], 20, 0, {}, settings(tmp_path))[0]["values"]["fid"] < 1e-6


class Copying:
    """A tokenizer that loses nothing."""

    reads, makes = ("image",), ("image", "tokens")

    def request(self, image):
        return {"image": image}

    def __call__(self, params, variables, frozen, request, keys):
        return {"image": request["image"] / 127.5 - 1, "tokens": np.zeros((len(request["image"]), 1, 1), np.int32)}


class Painting:
    """Paints each picture in the color of its class; without classes all are gray."""

    makes = ("image",)

    def __init__(self, classes):
        self.reads = ("label",) if classes else ()

    def request(self, label=None, steps=3):
        return {"label": label, "steps": steps}

    def __call__(self, params, variables, frozen, request, keys):
        label = request["label"]
        shades = np.full(len(keys), 0.5) if label is None else label / 2
        return {"image": np.broadcast_to((2 * shades - 1)[:, None, None, None], (len(keys), 32, 32, 3))}


def painting_run(stage1, module, **data):
    """A diffusion that is told classes, or nothing, without its training."""
    config = module.get_config("debug")
    with config.unlocked():
        config.data.update({"data_dir": stage1.config.data.data_dir, **data})
    sampler = Painting(classes=module is uvit)
    return TrainedSampler(**{**vars(stage1), "config": config, "sampler": sampler, "tokenizer": None})


def test_a_run_that_is_told_classes_draws_those_of_the_records(stage1, scenes_dir, tmp_path):
    run = painting_run(stage1, uvit)
    source = RecordSource("scenes/single32", "validation", str(scenes_dir))
    pictures = np.concatenate(list(draw_pictures(run, "validation", 20, 5, {"steps": 2})))
    backgrounds = np.array([source[index]["background"] for index in range(20)])
    assert len(set(backgrounds.tolist())) == 3
    np.testing.assert_array_equal(pictures[:, 0, 0, 0], np.array([0, 128, 255])[backgrounds])
    record = evaluate_run(run, ["fid"], ["validation"], 20, 5, {"steps": 2}, settings(tmp_path))[0]
    assert record["steps"] == 2 and record["values"]["fid"] > 0
    with pytest.raises(UserError, match="no class number in its field 'kind'"):
        evaluate_run(
            painting_run(stage1, uvit, label_field="kind"), ["fid"], ["validation"], 20, 5, {}, settings(tmp_path)
        )


def test_a_run_that_is_told_nothing_draws_pictures(stage1):
    pictures = np.concatenate(list(draw_pictures(painting_run(stage1, ddpm), "validation", 20, 5, {})))
    assert pictures.shape == (20, 32, 32, 3) and (pictures == 128).all()


@pytest.mark.parametrize(("module", "told"), [(uvit, "told classes, no captions"), (ddpm, "told nothing")])
@pytest.mark.parametrize("names", [[], ["caption_accuracy"], ["clip_score"]])
def test_what_needs_captions_is_not_offered_without(stage1, module, told, names):
    with pytest.raises(UserError, match=f"run of diffusion .{told}..* fid, kid, cmmd, inception_score, prec"):
        evaluate_run(painting_run(stage1, module), names, ["validation"], 20, 0, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper/uvit.py", "paper/ddpm.py"])
def test_a_trained_diffusion_without_captions_is_evaluated(name, debug_run, tmp_path):
    run = TrainedSampler.open(debug_run(name), chunk=16)
    records = evaluate_run(run, ["fid", "kid"], ["validation"], 20, 5, {}, settings(tmp_path))
    assert [record["metric"] for record in records] == ["fid", "kid"]
    assert all(np.isfinite(value) for record in records for value in record["values"].values())
    assert any((run.run.folder / "samples").glob("*.png"))


def test_features_of_the_dataset_are_computed_once_for_all_runs(stage2, stage1, tmp_path):
    first, second, other = Colors(), Colors(), Colors("colors/none/2")
    for run, extractor in ((stage2, first), (stage1, second), (stage1, other)):
        evaluate_run(run, ["fid"], ["validation"], 20, 0, {}, settings(tmp_path, extractor))
    assert (first.seen, second.seen, other.seen) == (40, 20, 40)


def test_features_of_replaced_records_are_not_kept(stage1, tmp_path, monkeypatch):
    read = RecordSource._fetch

    def fetch(self, place):
        if place == 3:
            raise OSError("a moment's failure")
        return read(self, place)

    monkeypatch.setattr(RecordSource, "_fetch", fetch)
    evaluate_run(stage1, ["fid"], ["validation"], 20, 0, {}, settings(tmp_path))
    assert not (tmp_path / "features").exists()


def test_default_metrics_need_no_features(stage1):
    assert {record["metric"] for record in evaluate_run(stage1, [], ["validation"], 8, 0, {})} == {"reconstruction"}


def test_records_stand_beside_others_in_file_table_and_report(stage1, tmp_path):
    names = ["reconstruction", "fid", "precision_recall"]
    records = evaluate_run(stage1, names, ["validation"], 20, 0, {}, settings(tmp_path))
    write_records(stage1.run, records)
    write_records(stage1.run, evaluate_run(stage1, names, ["validation"], 20, 0, {}, settings(tmp_path)))
    stored = json.loads((stage1.run.folder / "evaluation.json").read_text())
    assert [record["metric"] for record in stored] == names
    table = format_table(records)
    assert "precision " in table and "+-" in table and "num_real" in table
    assert "%" not in next(line for line in table.splitlines() if line.startswith("  fid"))
    write_report(tmp_path / "report.html", "t", "s", [Section("run", "text", stage1.run.folder, {}, {})])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<table>") == 3 and ">psnr_db<" in page and ">fid<" in page and "colors/none/1" in page


def test_mistakes(stage2, tmp_path):
    def evaluate(names, num=20, **changes):
        return evaluate_run(stage2, names, ["validation"], num, 0, {}, settings(tmp_path, **changes))

    with pytest.raises(UserError, match="fid compares features; give --features=inception:FILE"):
        evaluate_run(stage2, ["fid"], ["validation"], 20, 0, {})
    with pytest.raises(UserError, match="'fiid' does not apply to this run of dalle; choose caption_accuracy, .*, fid"):
        evaluate(["fiid"])
    with pytest.raises(UserError, match="kid is not defined on features of colors-alone/none/1, which are for fid"):
        evaluate(["kid"], extractor=ColorsAlone())
    with pytest.raises(UserError, match="kid needs 1000 pictures.*not 20.*--kid_subset_size=0"):
        evaluate(["kid"], kid_subset_size=1000)
    with pytest.raises(UserError, match="--kid_subset_size must be at least 2, or 0"):
        evaluate(["kid"], kid_subset_size=1)
    with pytest.raises(UserError, match="precision_recall needs 4 pictures.*not 3; raise --num"):
        evaluate(["precision_recall"], num=20, num_real=3)
    with pytest.raises(UserError, match="fewer than --num_real=5000"):
        evaluate(["fid"], num_real=5000)
    with pytest.raises(UserError, match="fewer than --num=5000"):
        evaluate(["fid"], num=5000)
    assert not (tmp_path / "features").exists()


@pytest.mark.slow
def test_the_command_with_the_whole_network(stage1, tmp_path):
    """Random weights, labelled so in the record."""
    command = [sys.executable, "-m", "evaluation", f"--run={stage1.run.folder}", "--metrics=fid,inception_score,kid"]
    command += ["--features=inception:random", "--resize=tf1", "--num=12", "--kid_subset_size=5", "--kid_subsets=2"]
    command += ["--splits=held_out", f"--features_dir={tmp_path}/features"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert output.returncode == 0 and "fid on held_out" in output.stdout, output.stderr
    stored = json.loads((stage1.run.folder / "evaluation.json").read_text())
    records = {record["metric"]: record for record in stored if record["split"] == "held_out"}
    assert records["fid"]["features"].startswith("inception-random/tf1/") and records["fid"]["num_real"] == 12
    assert records["fid"]["values"]["fid"] > 0 and records["inception_score"]["values"]["inception_score"] >= 1
    assert (records["kid"]["subsets"], records["kid"]["subset_size"]) == (2, 5)
    assert len(list((tmp_path / "features").iterdir())) == 1
    wrong = subprocess.run([*command, "--metrics=cmmd"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2 and wrong.stderr.startswith(
        "error: cmmd is not defined on features of inception-random"
    )
