"""Answers about pictures are counted a kind, and what a description says is compared with the scene."""

import jax
import numpy as np
import pytest

from data.pipeline import open_stream
from data.scenes import parse_caption
from data.scenes.questions import TYPES
from data.scenes.scene import WORLDS
from evaluation.answer_perplexity import answer_perplexity
from evaluation.answers import describes
from evaluation.applicable_metrics import applicable_metrics
from evaluation.clip.metrics import ClipSettings
from evaluation.evaluate import evaluate_run
from models import create_model
from sample.trained import TrainedSampler


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a large red circle left of a small blue star on a black background", True),
        ("a blue star to the right of a red circle", True),
        ("a red circle left of a blue star on navy", False),
        ("a red circle right of a blue star", False),
        ("a red circle", False),
        ("a red red of star", False),
        ("", False),
    ],
)
def test_a_description_is_right_where_all_that_it_names_is_there(text, right):
    world = WORLDS["pair32"]
    truth = parse_caption(world, "a large red circle left of a small blue star on a black background")
    assert describes(world, text, truth) == right


@pytest.mark.slow
def test_each_kind_of_question_is_counted(debug_run, monkeypatch):
    trained = TrainedSampler.open(debug_run("scenes/vision_adapter.py"), chunk=4)
    assert applicable_metrics(trained, "validation", ClipSettings())[0] == (
        *("answers", "answer_perplexity", "text_perplexity"),
    )
    said = iter(["circle"] * 100)
    monkeypatch.setattr(TrainedSampler, "decode", lambda self, ids: tuple(next(said) for _ in ids))
    (record,) = evaluate_run(trained, ("answers",), ("validation",), 4, 0, {})
    values = record["values"]
    kinds = {kind.replace(" ", "_") for kind in TYPES}
    assert set(values) == kinds | {f"wrong_picture_{kind}" for kind in kinds}
    assert values["color"] == values["describe"] == 0.0 and values["shape"] == values["wrong_picture_shape"]
    assert np.isfinite(list(values.values())).all()


@pytest.mark.slow
def test_the_perplexity_of_answers_without_a_picture_is_the_language_model_s(debug_run):
    trained = TrainedSampler.open(debug_run("scenes/vision_adapter.py"), chunk=4)
    params = trained.weights.params["vision_adapter"]
    head = params["cross_blocks_0"]
    trained.weights.params["vision_adapter"] = {
        **params,
        "cross_blocks_0": {**head, "attention_gate": np.full(1, 2.0), "mlp_gate": np.full(1, 2.0)},
    }
    values = answer_perplexity(trained, "validation", 6)["values"]
    right, wrong, without = (
        values[f"{name}_perplexity"] for name in ("answer", "with_wrong_picture", "without_picture")
    )
    assert len({round(value, 3) for value in (right, wrong, without)}) == 3

    language = dict(trained.sampler.model.network_at("language"))
    model = create_model(**language)
    stream = open_stream(trained.config.data, trained.tokenizer, split="validation", seed=0, train=False)
    batch = stream.batch(range(6))
    logits = jax.jit(model.apply)({"params": params["language"]}, jax.numpy.asarray(batch["text"][:, :-1]))
    logs, mask = np.asarray(jax.nn.log_softmax(logits)), batch["text_mask"][:, 1:]
    said = np.take_along_axis(logs, batch["text"][:, 1:, None], axis=-1)[..., 0]
    assert without == pytest.approx(np.exp(-said[mask].mean()), rel=1e-5)
