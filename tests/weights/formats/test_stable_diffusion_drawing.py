"""A converted Stable Diffusion draws: in half precision, of prompts with weights and of long ones."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from cli.errors import UserError
from sample.__main__ import main as sample
from sample.command import draw_samples
from sample.conditions import Condition, Made, Order, draw_outputs, make_conditions, order_rows
from sample.embedding import ClipEmbedder
from sample.sheets.attention import draw_attention, read_tokens
from sample.sheets.axes import Axis
from sample.sheets.sweep import make_cells
from sample.trained import TrainedSampler

from ..stable_diffusion_samples import LENGTH, change_json


def test_half_precision_leaves_the_first_stage_as_it_is(ours):
    """Networks compute in bfloat16, states and pictures stay float32, and samples are near those of float32."""
    single, half = (TrainedSampler.open(ours, chunk=2, dtype=dtype) for dtype in ("", "bfloat16"))
    models = half.sampler.model, half.sampler.text.model, half.sampler.first_stage.model
    assert [jnp.dtype(model.dtype).name for model in models] == ["bfloat16", "bfloat16", "float32"]
    assert half.describe(0, {})["dtype"] == "bfloat16" and "dtype" not in single.describe(0, {})
    features, exact = (
        each.sampler.text(each.weights.params, each.frozen, jnp.asarray(each.encode(["a red cat"])["text"]))
        for each in (half, single)
    )
    assert features.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(features, np.float32), exact, atol=0.05)
    assert np.abs(np.asarray(features, np.float32) - exact).max() > 0


def test_prompts_with_weights_and_beyond_the_context(ours, tmp_path, capsys):
    """Chunks are read one by one, the negative prompt in as many, and the command says what counts how much."""
    trained = TrainedSampler.open(ours, chunk=2)
    long = "red cat red cat red cat (red:2) cat"  # 8 tokens, of which a chunk holds 6
    order = Order((Condition(long),), 0, {}, "a cat", prompt_weights=True, long_prompts=True)
    rows = order_rows(trained, order)
    assert rows["text"].shape == rows["negative"].shape == rows["text_weights"].shape == (1, 2 * LENGTH)
    assert rows["text_weights"][0, LENGTH + 1] == 2 and rows["text_weights"].sum() == 2 * LENGTH + 1

    def features(text, **more):
        told = {"text": jnp.asarray(text), **{name: jnp.asarray(row) for name, row in more.items()}}
        return np.asarray(trained.sampler.conditioning(trained.weights.params, trained.frozen, told).tokens)

    both = features(rows["text"])
    apart = [features(rows["text"][:, place : place + LENGTH]) for place in (0, LENGTH)]
    np.testing.assert_allclose(both, np.concatenate(apart, axis=1), atol=1e-6)
    weighed = both * rows["text_weights"][..., None]
    expected = weighed * both.mean() / weighed.mean()
    np.testing.assert_allclose(features(rows["text"], weights=rows["text_weights"]), expected, atol=1e-4)

    settings = ["--negative_prompt=a cat", "--num=1", "--steps=1", "--sampler=ddim"]
    flags = ["--prompt_weights", "--long_prompts"]
    sample([f"--run={ours}", f"--prompt={long}", *settings, *flags, f"--out={tmp_path}/grid.png"])
    said = capsys.readouterr().out
    assert "'red' 2, ' cat' 1" in said and '"prompt_weights": true' in said and (tmp_path / "grid.png").is_file()
    cut = order_rows(trained, Order((Condition(long),), 0, {}, prompt_weights=True))
    assert cut["text"].shape == (1, LENGTH) and "only the first 8 tokens count" in capsys.readouterr().out
    # In parts it has 8 tokens, and together, as "cat", 6.
    parts = make_conditions(["red cat red cat red (c:2)at", "red cat red cat red (c:3)at", "red (cat:2)"])
    order_rows(trained, Order(parts, prompt_weights=True))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: only the first 8 tokens count of 'red cat red cat red cat'"]


def test_a_prompt_draws_the_same_picture_beside_a_longer_one(ours, monkeypatch):
    """Empty chunks that fill its text up are seen neither by the denoiser nor in the mean that weights keep."""
    trained = TrainedSampler.open(ours, chunk=2)
    short, long = "a (red:1.5) cat", "red cat red cat red cat red cat"
    settings = {"sampler": "ddim", "steps": 2}

    def drawn(*prompts):
        order = Order(make_conditions(prompts), 3, settings, "a cat", prompt_weights=True, long_prompts=True)
        rows = order_rows(trained, order)
        return order, rows, draw_outputs(trained, order, rows, 1, attention=True)

    (_, rows, alone), (order, padded, both) = drawn(short), drawn(short, long)
    assert rows["text"].shape == (1, LENGTH) and "contexts" not in rows
    assert padded["text"].shape == (2, 2 * LENGTH) and padded["contexts"].tolist() == [1, 2]
    np.testing.assert_allclose(both["image"][0], alone["image"][0], atol=1e-4)
    np.testing.assert_allclose(both["attention"][0, ..., :LENGTH], alone["attention"][0], atol=1e-5)
    assert not both["attention"][0, ..., LENGTH:].any() and both["attention"][1, ..., LENGTH:].all()
    # The sheet of maps has no cells for what is not seen, and a cell of a sweep is drawn as the prompt alone.
    read = []
    monkeypatch.setattr(
        "sample.sheets.attention.read_tokens", lambda *told: read.append(len(told[1])) or read_tokens(*told)
    )
    draw_attention(trained, order, 1)
    assert read == [LENGTH, 2 * LENGTH]
    cells = make_cells(trained, order, (Axis("prompt", (short, long)),))
    assert [cell.rows["text"].shape[1] for cell in cells] == [LENGTH, 2 * LENGTH]


def test_a_text_tower_that_is_tuned_reads_weights_and_long_prompts_too(ours, tmp_path):
    tuned = shutil.copytree(ours, tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    text = config["frozen"].pop("text")
    config["models"]["text"] = {name: text[name] for name in text if name not in ("source", "part", "step", "run")}
    change_json(tuned / "config.json", **config)
    order, features = Order((Condition("red cat red cat red (cat:2) cat"),), prompt_weights=True, long_prompts=True), []
    for folder in (ours, tuned):
        trained = TrainedSampler.open(folder)
        rows = {name.replace("text_", ""): jnp.asarray(row) for name, row in order_rows(trained, order).items()}
        features.append(trained.sampler.conditioning(trained.weights.params, trained.frozen, rows).tokens)
    assert features[0].shape[1] == 2 * LENGTH
    np.testing.assert_array_equal(*features)


@pytest.mark.parametrize("asked", ["long_prompts", "prompt_weights"])
def test_prompts_that_nothing_reads_get_a_line(ours, asked):
    trained = TrainedSampler.open(ours)
    with pytest.raises(UserError, match="the prompt is empty"):
        order_rows(trained, Order((Condition(" "),), **{asked: True}))
    without = dataclasses.replace(trained, tokenizer=None)
    with pytest.raises(UserError, match="has no tokenizer; convert it again, with --tokenizer"):
        order_rows(without, Order((Condition("a cat"),), **{asked: True}))


def test_pictures_are_compared_with_prompts_without_brackets(ours, monkeypatch):
    trained, compared = TrainedSampler.open(ours), []
    monkeypatch.setattr(ClipEmbedder, "cosines", lambda _, __, captions: compared.extend(captions) or np.zeros(4))
    monkeypatch.setattr("sample.command.draw", lambda *_: Made(np.zeros((4, 16, 16, 3), np.uint8), None))
    order = Order(make_conditions(["a (red:1.3) cat", r"[a] \(cat\)"]), prompt_weights=True)
    drawn = draw_samples(trained, order, 2, ClipEmbedder(trained))
    assert compared == ["a red cat", "a red cat", "a (cat)", "a (cat)"]
    assert drawn.records[0]["prompt"] == "a (red:1.3) cat"
