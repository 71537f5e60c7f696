"""Evaluation of a real (tiny) CLIP run, and of one that knows the answers."""

import json

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from data import scenes
from evaluation.clip import linear_probe
from evaluation.clip import metrics as clip_evaluation
from evaluation.clip.metrics import ClipSettings, Pictures, clip_makers, read_pictures
from evaluation.clip.scene_prompts import attribute_values, captions_of, scene_label
from evaluation.evaluate import default_splits, evaluate_run
from evaluation.features.extractors import create_extractor
from evaluation.records import format_table, write_records
from evaluation.tools import Tools
from sample.embedding import ClipEmbedder


def test_a_run_is_evaluated_and_its_matrix_is_drawn(clip_run, monkeypatch):
    monkeypatch.setattr(linear_probe, "STRENGTHS", (1e-2, 1.0))
    settings = ClipSettings(num_train=120)
    metrics = ["zero_shot", "retrieval", "linear_probe", "similarity"]
    records = evaluate_run(clip_run, metrics, ["validation", "held_out"], 40, 0, {}, Tools(clip=settings))
    assert [(r["metric"], r["split"]) for r in records[:2]] == [
        ("zero_shot", "validation"),
        ("retrieval", "validation"),
    ]
    zero_shot, retrieval, probe = records[0], records[1], records[2]
    assert set(zero_shot["values"]) == {"shape", "color", "size", "background"} == set(probe["values"])
    assert zero_shot["counted"]["shape"] == 40 and 0 <= zero_shot["values"]["shape"] <= 1
    assert retrieval["captions"] == 5 * retrieval["pictures"] and retrieval["pictures"] <= 40
    assert probe["num_train"] == 120 and probe["values"]["background"] > 0.5  # a linear function of pixels
    with Image.open(clip_run.run.folder / "samples" / "similarity_validation.png") as picture:
        assert min(picture.size) > 300
    write_records(clip_run.run, records)
    assert json.loads((clip_run.run.folder / "evaluation.json").read_text())[0]["metric"] == "zero_shot"
    assert "seed" not in records[0] and records[0]["step"] == 4  # nothing is drawn
    ranks = [line for line in format_table(records).splitlines() if "median_rank" in line]
    assert len(ranks) == 4 and not any("%" in line for line in ranks) and "%" in format_table(records)


class Oracle:
    """Features that say what a scene is: one number for each distinct caption in full."""

    def __init__(self, world):
        self.world, self.seen = world, {}

    def vector(self, scene):
        values = [f"{item.shape} {item.color} {item.size}".split() for item in scene.objects]
        words = [f"{k}{word}" for k, item in enumerate(values) for word in item]
        vector = np.zeros(600)
        for word in [*words, scene.background, scene.relation or ""]:
            vector[self.seen.setdefault(word, len(self.seen))] = 1
        return vector / np.linalg.norm(vector)

    def text(self, text):
        query = scenes.parse_caption(self.world, text)
        return self.vector(query)


@pytest.mark.parametrize("name", ["single32", "pair32"])
def test_a_network_that_knows_is_always_right(clip_run, monkeypatch, name):
    world = scenes.WORLDS[name]
    rng = np.random.default_rng(0)
    shown = tuple(scenes.sample_scene(world, rng) for _ in range(30))
    captions = tuple(scenes.write_captions(world, scene) for scene in shown)
    images = rng.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8)
    names = {k: v for k, v in attribute_values(world).items() if k != "relation"}
    labels = {k: np.array([scene_label(world, scene, k) for scene in shown]) for k in names}
    oracle = Oracle(world)
    features = np.stack([oracle.vector(scene) for scene in shown])
    pictures = Pictures(features, images, captions, labels, names, world, shown)
    monkeypatch.setattr(clip_evaluation, "read_pictures", lambda *_: pictures)
    monkeypatch.setattr(ClipEmbedder, "texts", lambda _, texts: np.stack([oracle.text(text) for text in texts]))
    makers = clip_makers(clip_run, "validation", 30, ClipSettings())
    zero_shot, retrieval = makers["zero_shot"](), makers["retrieval"]()
    assert set(zero_shot["values"].values()) == {1.0}
    pairs = {"pair_shape", "pair_color", "pair_size", "pair_background", "relation"}
    assert pairs <= set(zero_shot["values"]) if name == "pair32" else not pairs & set(zero_shot["values"])
    assert retrieval["values"]["text_to_image_r1"] == retrieval["values"]["image_to_text_r1"] == 1
    assert retrieval["pictures"] == len(set(shown))


def test_equal_texts_have_equal_features_in_their_order(clip_run):
    texts = ["a small red circle", "a large blue star", "a small red circle"]
    embed = ClipEmbedder(clip_run).texts
    features = embed(texts)
    np.testing.assert_array_equal(features[0], features[2])
    np.testing.assert_array_equal(embed(["a green cross", texts[1]])[1], features[1])
    assert np.abs(embed(["a green cross"])[0] - features).max(axis=1).min() > 1e-4
    np.testing.assert_allclose(ClipEmbedder(clip_run).texts(texts[1:2])[0], features[1], atol=1e-5)


def test_what_is_computed_by_default(clip_run):
    default = clip_evaluation.default_metrics(clip_run, "validation", ClipSettings())
    assert default == ("zero_shot", "retrieval", "similarity")
    assert default_splits(clip_run.config) == ["validation", "held_out"]
    with pytest.raises(UserError, match="fewer than --num=5000"):
        evaluate_run(clip_run, [], ["validation"], 5000, 0, {})
    with pytest.raises(UserError, match="no split 'test'"):
        evaluate_run(clip_run, [], ["validation", "test"], 10, 0, {})


def test_metrics_and_settings_of_other_runs_do_not_apply(clip_run):
    with pytest.raises(UserError, match="is a run of clip; leave out --guidance, --top_k"):
        evaluate_run(clip_run, [], ["validation"], 10, 0, {"guidance": 3.0, "top_k": 5})
    with pytest.raises(UserError, match="does not apply to this run of clip; choose zero_shot"):
        evaluate_run(clip_run, ["caption_accuracy"], ["validation"], 10, 0, {})


def test_a_clip_measures_features_of_pictures_of_any_size(clip_run):
    extractor = create_extractor(f"clip:{clip_run.run.folder}")
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3)).astype(np.uint8)
    features = extractor.features(images)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert "cmmd" in extractor.metrics and extractor.identity.startswith("clip/center_square/")
    assert create_extractor(f"clip:{clip_run.run.folder}").identity == extractor.identity
    with pytest.raises(UserError, match="--resize=tf1 is unknown to clip; this run has only center_square"):
        create_extractor(f"clip:{clip_run.run.folder}", "tf1")


def test_prompts_and_scenes_of_stored_records_agree(clip_run):
    pictures = read_pictures(ClipEmbedder(clip_run), "held_out", 20)
    world = scenes.WORLDS["single32"]
    for scene, captions in zip(pictures.scenes, pictures.captions, strict=True):
        assert captions_of(world, [scene])[0] == captions[0]
