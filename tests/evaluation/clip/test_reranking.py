"""What a CLIP makes of drawn pictures: a CLIP that knows chooses right, one that does not gains nothing."""

import json

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from evaluation.__main__ import main
from evaluation.clip import reranking as judging
from evaluation.clip.reranking import ClipScorer, chosen_from, powers_of_two
from evaluation.evaluate import evaluate_run
from evaluation.tools import Tools
from sample.embedding import ClipEmbedder


def test_the_chosen_is_the_nearest_of_each_group():
    right = np.array([[True, False, False, True], [False, False, True, False]])
    cosines = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    for k, chosen, possible in [(1, [0.5, 0.25], [0.5, 0.25]), (2, [0.5, 0.5], [1, 0.5]), (4, [1, 0], [1, 1])]:
        np.testing.assert_array_equal(chosen_from(right, cosines, k), (chosen, possible))
    # A cosine that is no number is not the nearest.
    assert chosen_from(np.array([[True, False]]), np.array([[0.3, np.nan]]), 2)[0] == 1
    assert powers_of_two(16) == [1, 2, 4, 8, 16] and powers_of_two(7) == [1, 2, 4]


def test_a_judge_that_knows_finds_whatever_is_right(stage2, clip_run, monkeypatch):
    """Grades are drawn at random, since the tiny transformer draws nothing right."""
    graded = []

    def grade(self, captions, images):
        graded.append(np.random.default_rng(len(graded)).random(len(captions)) < 0.3)
        return [{"all": bool(right)} for right in graded[-1]]

    monkeypatch.setattr(judging.SceneGrader, "grade", grade)
    monkeypatch.setattr(ClipEmbedder, "cosines", lambda *_: graded[-1] * 1.0)
    (record,) = evaluate_run(
        stage2, ["rerank"], ["validation"], 16, 0, {}, Tools(scorer=ClipScorer(ClipEmbedder(clip_run), candidates=4))
    )
    values = record["values"]
    assert values["chosen_4"] == values["any_4"] == np.any(graded, axis=0).mean()
    assert values["chosen_1"] == pytest.approx(np.mean(graded)) and values["chosen_1"] < values["chosen_2"]
    errors = record["standard_errors"]
    assert errors["chosen_1"] == errors["any_1"] > 0 and errors["chosen_4"] > 0 and record["candidates"] == 4
    with Image.open(stage2.run.folder / "samples" / "rerank_validation.png") as picture:
        assert min(picture.size) > 300


def test_the_score_is_the_mean_cosine_of_a_run_s_pictures(stage2, clip_run):
    clip = ClipEmbedder(clip_run)
    (record,) = evaluate_run(stage2, ["clip_score"], ["validation"], 16, 3, {}, Tools(scorer=ClipScorer(clip)))
    other = evaluate_run(
        stage2, ["clip_score"], ["validation"], 16, 3, {}, Tools(scorer=ClipScorer(clip, "torchmetrics"))
    )
    assert -1 <= record["values"]["clip_score"] <= 1 and record["convention"] == "cosine"
    assert other[0]["values"]["clip_score"] == pytest.approx(max(100 * record["values"]["clip_score"], 0))
    assert record["clip"] == str(clip_run.run.folder) and record["clip_step"] == 4


def test_pictures_drawn_in_blocks_are_those_drawn_at_once(stage2, clip_run, monkeypatch):
    monkeypatch.setattr(ClipEmbedder, "cosines", lambda self, images, captions: images.mean(axis=(1, 2, 3)) / 255)
    tools, scores = Tools(scorer=ClipScorer(ClipEmbedder(clip_run))), []
    for block in (256, 5):
        monkeypatch.setattr(judging, "BLOCK", block)
        (record,) = evaluate_run(stage2, ["clip_score"], ["validation"], 12, 3, {}, tools)
        scores.append(record["values"]["clip_score"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_the_command_judges_and_names_mistakes(stage2, clip_run):
    command = [f"--run={stage2.run.folder}", "--metrics=clip_score", "--splits=validation", "--num=8"]
    main([*command, f"--clip={clip_run.run.folder}"])
    stored = json.loads((stage2.run.folder / "evaluation.json").read_text())
    assert stored[-1]["metric"] == "clip_score" and "guidance" in stored[-1]
    for extra, message in [
        ([], "need a CLIP that scores; give --clip=RUN"),
        ([f"--clip={stage2.run.folder}"], "is a run of dalle, not of clip"),
        ([f"--clip={clip_run.run.folder}", "--convention=cosines"], "choose one of cosine, hessel, torchmetrics"),
        ([f"--clip={clip_run.run.folder}", "--candidates=0"], "must be at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            main([*command, *extra])
