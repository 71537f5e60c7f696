"""Evaluation of real (tiny) runs: what is computed, printed and kept."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from cli.config import load_config, to_json
from cli.errors import UserError
from data import scenes
from data.pictures import read_picture
from data.scenes.scenes_dataset_builder import generate_example
from evaluation import evaluate, report, sweep
from evaluation.__main__ import _DESCRIPTION, main
from evaluation.caption_accuracy import caption_accuracy, captioned_pictures
from evaluation.clip.metrics import CLIP_METRICS
from evaluation.clip.reranking import ClipScorer
from evaluation.evaluate import evaluate_run, on_dataset
from evaluation.features.metrics import FEATURE_METRICS, FeatureSettings
from evaluation.reconstruction import code_usage, reconstruction_errors
from evaluation.records import check_finite, format_table, read_records, write_records
from evaluation.report import headline_records
from evaluation.tools import Tools
from sample.embedding import ClipEmbedder
from sample.trained import TrainedSampler
from weights.run import Run

from ..data.made_up import NAME, prepare_made_up

ROOT = Path(__file__).resolve().parents[2]


def test_the_graded_captions_name_every_attribute_and_vary(stage1):
    pictures = captioned_pictures(stage1.config, "validation", 30)
    assert len(pictures.captions) == len(pictures.images) == 30
    assert len({caption.split()[0] for caption in pictures.captions}) > 1
    world = scenes.WORLDS["single32"]
    assert all(scenes.parse_caption(world, caption).complete for caption in pictures.captions)


def test_true_pictures_are_right_and_swapped_ones_wrong(stage1):
    pictures = captioned_pictures(stage1.config, "held_out", 40)
    right = caption_accuracy(stage1.config, pictures.captions, lambda captions: pictures.images)
    assert right.shares["all"] == 1.0 and right.counted["all"] == 40
    wrong = caption_accuracy(stage1.config, pictures.captions, lambda captions: np.roll(pictures.images, 1, 0))
    assert wrong.shares["all"] < 0.3


def test_captions_of_one_object_and_of_two_have_shares_of_their_own():
    world = scenes.WORLDS["pair32"]
    made = [generate_example(world, "1.0.0", "validation", index) for index in range(12)]
    captions = [next(text for text in one["captions"] if scenes.parse_caption(world, text).complete) for one in made]
    images = np.stack([read_picture(one["image"]) for one in made])
    pairs = np.array([len(one["objects"]) == 2 for one in made])
    drawn = np.where(pairs[:, None, None, None], 0, images).astype(np.uint8)
    accuracy = caption_accuracy(ConfigDict({"data": {"dataset": "scenes/pair32"}}), captions, lambda captions: drawn)
    assert (accuracy.shares["all_1_object"], accuracy.shares["all_2_objects"]) == (1, 0)
    assert (accuracy.counted["all_1_object"], accuracy.counted["all_2_objects"]) == (sum(~pairs), sum(pairs))
    assert 0 < sum(pairs) < 12


def test_a_tokenizer_run_is_evaluated_on_every_split(stage1):
    records = evaluate_run(stage1, [], ["validation", "held_out"], 20, 0, {})
    assert [(record["metric"], record["split"]) for record in records] == [
        ("reconstruction", "validation"),
        ("reconstruction", "held_out"),
    ]
    assert records[0]["values"]["scene_all"] <= 1 and records[0]["values"]["mse"] > 0
    assert "scene_shape" in format_table(records) and "+-" in format_table(records)


def test_a_first_stage_is_evaluated_as_a_tokenizer_is(debug_run):
    trained = TrainedSampler.open(debug_run("scenes/autoencoder.py"), chunk=16)
    (record,) = evaluate_run(trained, [], ["validation"], 16, 0, {})
    assert record["metric"] == "reconstruction" and 0 < record["values"]["mse"] < 1
    assert "scene_all" in record["values"] and "codes_used" not in record["values"]


def test_records_carry_what_they_depend_on_and_are_replaced_not_repeated(stage2):
    for guidance in (1.0, 3.0, 1.0):
        records = evaluate_run(stage2, ["caption_accuracy"], ["validation"], 20, 5, {"guidance": guidance})
        write_records(stage2.run, records)
    stored = json.loads((stage2.run.folder / "evaluation.json").read_text())
    stored = [record for record in stored if record["metric"] == "caption_accuracy"]
    assert [record["guidance"] for record in stored] == [3.0, 1.0]
    expected = {"num": 20, "seed": 5, "step": 4, "ema": True, "dataset": "scenes/single32/1.0.0", "temperature": 0.5}
    assert {key: stored[0][key] for key in expected} == expected
    assert set(stored[0]["values"]) == {"all", "count", "background", "shape", "color", "size"}
    assert (stage2.run.folder / "samples" / "evaluation_validation_guidance_3.0_seed_5.png").is_file()


def test_mistakes(stage1, stage2):
    with pytest.raises(UserError, match="leave out --keep_rows"):
        evaluate_run(stage2, ["caption_accuracy"], ["validation"], 10, 0, {"keep_rows": 3})
    with pytest.raises(UserError, match="unrecognized arguments: --keep_rows=3"):
        main([f"--run={stage2.run.folder}", "--keep_rows=3"])
    with pytest.raises(UserError, match="does not apply"):
        evaluate_run(stage1, ["caption_accuracy"], ["validation"], 10, 0, {})
    with pytest.raises(UserError, match="fewer than --num=5000"):
        evaluate_run(stage1, [], ["validation"], 5000, 0, {})
    with pytest.raises(UserError, match="no split 'nope'"):
        evaluate_run(stage1, [], ["nope"], 5, 0, {})


def test_a_metric_that_fails_costs_no_other(stage1, monkeypatch):
    """Records are kept as they come; what failed is named at the end, one over NaN among it."""
    found = {"reconstruction": {"values": {"mse": 0.5}}, "fid": {"values": {"fid": float("nan")}}}
    makers = {"fid": lambda: found["fid"], "kid": lambda: {"values": {"kid": 0.25}}}
    monkeypatch.setattr(evaluate, "_reconstruction", lambda *_: found["reconstruction"])
    monkeypatch.setattr(evaluate, "check_feature_metrics", lambda *_: None)
    monkeypatch.setattr(evaluate, "feature_makers", lambda *_: makers)
    kept, names = [], ["fid", "reconstruction", "kid"]
    with pytest.raises(UserError, match=r"^fid on validation: fid is not finite \(nan\).*; 2 others are kept$"):
        evaluate_run(
            stage1, names, ["validation"], 5, 0, {}, Tools(features=object.__new__(FeatureSettings)), kept.append
        )
    assert [(record["metric"], record["num"]) for record in kept] == [("reconstruction", 5), ("kid", 5)]


def test_a_metric_without_a_split_is_computed_and_recorded_once(debug_run, monkeypatch):
    trained = TrainedSampler.open(debug_run("scenes/unidiffuser.py"), chunk=4)
    found = {"values": {"all": 0.5}, "counted": {"all": 4}}
    monkeypatch.setattr(evaluate, "agreement_values", lambda *_: found)
    monkeypatch.setattr(evaluate, "written_values", lambda *_: found)
    records = evaluate_run(trained, ["agreement", "written_captions"], ["validation", "held_out"], 4, 0, {})
    assert [(record["metric"], record["split"]) for record in records] == [
        ("agreement", None),
        ("written_captions", "validation"),
        ("written_captions", "held_out"),
    ]
    assert format_table(records).startswith("agreement ({")


def test_shares_are_what_is_counted_and_nothing_else(tmp_path):
    record = {"metric": "new", "split": "validation", "num": 4, "values": {"right": 0.5, "anything": 0.5}}
    record |= {"counted": {"right": 4}, "strength": {"right": 0.1}, "standard_errors": {"right": 0.25}, "seed": 7}
    shares = [line.split() for line in format_table([record]).splitlines()[1:]]
    assert shares == [["right", "50.0", "%", "+-", "25.0"], ["anything", "0.5"]]
    table = report._score_table([record])
    assert ">50.0 %<" in table and ">0.5<" in table
    assert table.endswith('<p class="note">seed 7</p>')  # what it was computed with, and nothing that it found


def test_help_says_of_each_metric_what_it_is():
    for name in (*evaluate._FOUND, *FEATURE_METRICS, *CLIP_METRICS):
        assert re.search(rf"^{name} +\S", _DESCRIPTION, re.MULTILINE), name


def test_a_file_of_records_is_json_whatever_it_held(tmp_path):
    run = Run(tmp_path, ConfigDict())
    (tmp_path / "evaluation.json").write_text('[{"metric": "a", "values": {"x": NaN}}]')
    write_records(run, [{"metric": "b", "values": {"x": 1.0}}])
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    assert [record["values"]["x"] for record in read_records(tmp_path)] == [None, 1.0]
    for text in ("{", "{}", "[1]", "[" * 100_000):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(UserError, match="evaluation.json is n.*; move it away"):
            read_records(tmp_path)
    with pytest.raises(UserError, match="x is not finite"):
        check_finite({"values": {"x": float("inf")}})


def test_errors_and_usage_match_their_definitions():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    errors = reconstruction_errors(images, images + 51)
    assert errors["mse"] == pytest.approx(0.04) and errors["psnr_db"] == pytest.approx(13.979, abs=1e-3)
    usage = code_usage(np.array([[0, 0], [3, 3]]), 8)
    assert usage["codes_used"] == 2 and usage["code_perplexity"] == pytest.approx(2.0)


def test_a_record_without_a_caption_is_named_before_anything_is_drawn(stage2, clip_run, tmp_path, monkeypatch):
    """Every metric alike; a blank caption beside another one is left out."""
    texts = tfds.features.Sequence(tfds.features.Text())
    whole = [{"captions": [" ", "a small red circle"]}] * 20
    prepare_made_up(tmp_path, {"captions": texts}, {"whole": whole, "odd": [*whole[:10], *[{"captions": [" "]}] * 10]})
    scorer = Tools(scorer=ClipScorer(ClipEmbedder(clip_run)), features=None)
    drawn = []
    monkeypatch.setattr(TrainedSampler, "__call__", lambda *_, **__: drawn.append(1))
    asked = ((stage2, ["clip_score"], scorer), (clip_run, ["retrieval"], None), (clip_run, ["similarity"], None))
    for trained, names, tools in asked:
        elsewhere = on_dataset(trained, NAME, str(tmp_path))
        with pytest.raises(UserError, match="record .* of made_up has no caption .* have none"):
            evaluate_run(elsewhere, names, ["whole", "odd"], 20, 0, {}, tools)
        assert not drawn
    monkeypatch.undo()
    evaluate_run(on_dataset(clip_run, NAME, str(tmp_path)), ["retrieval"], ["whole"], 20, 0, {})


def test_fields_are_the_run_s_on_its_own_dataset_and_named_or_usual_elsewhere(stage2):
    with stage2.config.unlocked():
        stage2.config.data.text_field = "captions"
    own, other = on_dataset(stage2, "", ""), on_dataset(stage2, "scenes/pair32", "")
    named = on_dataset(stage2, "scenes/pair32", "", image_field="image", text_field="told")
    with stage2.config.unlocked():
        stage2.config.data.text_field = ""
    assert [run.config.data.text_field for run in (own, other, named)] == ["captions", "", "told"]
    assert named.config.data.image_field == "image"


def test_a_sweep_says_in_each_record_what_it_was_computed_with(debug_run, capsys, monkeypatch):
    folder = debug_run("scenes/ddpm_uvit.py")
    command = [f"--run={folder}", "--metrics=caption_accuracy", "--splits=validation", "--num=2", "--seed=77"]
    # Channels that are guided are a setting with an effect in some cells.
    main([*command, "--sweep", "guidance=1,3", "--sweep", "ema=0,1", "--steps=2", "--guided_channels=2"])
    records = [record for record in read_records(folder) if record.get("seed") == 77]
    assert {(record["ema"], record["guidance"]) for record in records} == {
        (a, w) for a in (False, True) for w in (1, 3)
    }
    for record in records:
        assert (record["num"], record["steps"], record["sampler"]) == (2, 2, "dpm_solver_multistep")
    assert "cell 4 of 4: ema=1, guidance=3: caption_accuracy on validation: all" in capsys.readouterr().out
    assert len(list((folder / "samples").glob("evaluation_validation_*_seed_77.png"))) == 4
    monkeypatch.setattr(sweep, "evaluate_run", None)  # what is impossible in one cell is found before any is computed
    for axis, message in (
        ("sampler=ddim,lms", "sampler=lms: .*unknown sampler 'lms'"),
        ("step=2,99999", "step=.*has no checkpoint 99999"),
        ("seed=1,2", "--sweep seed and --seed are both given"),
        ("temperature=1,2", "has no such setting; it has .*sampler, spacing, steps"),
        ("ema=0.5", "length 0.5 is impossible"),
        ("keep_rows=1,2", "there is no such key; choose from guidance"),
        ("steps=1,2", "--sweep steps and --steps are both given"),
    ):
        with pytest.raises(UserError, match=message):
            main([*command, "--steps=2", "--sweep", axis])
    with pytest.raises(UserError, match="ema=0.1: .* has no averages to make others of"):
        main([*command, "--sweep", "ema=0.1,1"])
    with pytest.raises(UserError, match="--sweep ema and --no_ema are both given"):
        main([*command, "--no_ema", "--sweep", "ema=0,1"])


def test_a_report_shows_what_was_drawn_as_the_kind_of_data_that_was_learned(tmp_path):
    """Of a UniDiffuser that tells kinds apart, config.sample has -1 for it, and records the kind itself."""
    variant = f"--config={ROOT}/configs/scenes/unidiffuser.py:debug"
    config = load_config([variant, "--config.models.unidiffuser.data_types=2"])
    (tmp_path / "config.json").write_text(to_json(config))
    drawn = {"metric": "caption_accuracy", "dataset": "scenes/single32/1.0.0", "values": {}}
    learned, other = ({**drawn, "split": f"kind {kind}", "data_type": kind} for kind in (1, 0))
    (tmp_path / "evaluation.json").write_text(json.dumps([learned, other]))
    assert headline_records(tmp_path) == [learned]
