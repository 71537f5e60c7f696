"""What CLIP and a captioner make of a dataset, stored: the same as live, for UniDiffuser and for captioners."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from data.pipeline import load_tokenizer, open_stream
from sample.first_stage import FirstStage
from sample.samplers.unidiffuser import UniDiffuserSampler
from train.feature_pass import precompute
from train.loop import train
from train.objectives import create_objective
from train.precomputed import example_spec, locate_precomputed, precomputable
from weights.run import read_metrics
from weights.sources import load_frozen

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "unidiffuser.py:debug": ("latent_moments", "image_features", "caption_latents"),
    "captioner.py:debug": ("token_features",),
    "captioner.py:debug_mlp": ("image_features",),
}


@pytest.fixture
def make_config(scenes_dir, tmp_path):
    """`make_config(name, stored)`: a config on a copy of the dataset, which the test may write to."""
    shutil.copytree(scenes_dir, tmp_path / "data", ignore=shutil.ignore_patterns("precomputed"))

    def make(name: str, *stored: str):
        settings = (f"data.data_dir={tmp_path}/data", *(f"data.{field}=auto" for field in stored))
        return load_config([f"--config={ROOT}/configs/scenes/{name}", *(f"--config.{each}" for each in settings)])

    return make


def test_stored_features_are_the_live_ones_and_training_takes_them(make_config, monkeypatch):
    name, fields = "unidiffuser.py:debug", FIELDS["unidiffuser.py:debug"]
    config = make_config(name)
    assert precomputable(config) == fields
    for field in fields:
        precompute(config, field)
    cached = locate_precomputed(make_config(name, *fields), load_tokenizer(config.data))
    tokenizer = load_tokenizer(config.data)
    live, fast = (
        open_stream(each.data, tokenizer, split="train", seed=0, train=True).batch(range(4))
        for each in (config, cached)
    )
    spec = example_spec(cached)
    assert {field: (value.shape[1:], value.dtype) for field, value in fast.items()} == spec and "image" not in fast
    objective, frozen = create_objective(config), load_frozen(config)
    read = jax.jit(objective._read)
    made = read(frozen, live)
    np.testing.assert_allclose(fast["image_features"], made["clip"], atol=1e-5)
    np.testing.assert_allclose(fast["caption_latents"], made["text"], atol=1e-5)
    np.testing.assert_array_equal(read(frozen, fast)["clip"], fast["image_features"])
    assert np.ptp(fast["caption_latents"], axis=0).max() > 1e-3  # captions differ
    with pytest.raises(UserError, match="latent_moments and image_features go together"):
        create_objective(make_config(name, "image_features"))

    # The pictures of a preview are decoded in one program; what is drawn is left out here.
    programs, decode = [], FirstStage.decode

    def decode_traced(stage, frozen, z):
        programs.append(isinstance(z, jax.core.Tracer))
        return decode(stage, frozen, z)

    fast = jax.tree.map(jnp.asarray, fast)
    drawn = {"image": jnp.zeros((4, 32, 32, 3)), "text": fast["text"]}
    monkeypatch.setattr(FirstStage, "decode", decode_traced)
    monkeypatch.setattr(UniDiffuserSampler, "__call__", lambda *_: drawn)
    shown = objective.preview({}, {}, frozen, fast, jax.random.key(0))["image_to_text"].images
    assert programs == [True] and shown.shape == (4, 32, 32, 3) and shown.dtype == np.uint8


@pytest.mark.parametrize("name", ["captioner.py:debug", "captioner.py:debug_mlp"])
def test_a_captioner_s_stored_features_are_the_live_ones(make_config, name):
    (field,) = FIELDS[name]
    config = make_config(name)
    precompute(config, field, splits=("validation",))
    tokenizer = load_tokenizer(config.data)
    cached = locate_precomputed(make_config(name, field), tokenizer)
    live, fast = (
        open_stream(each.data, tokenizer, split="validation", seed=0, train=False).batch(range(4))
        for each in (config, cached)
    )
    sampler, frozen = create_objective(config).sampler, load_frozen(config)
    features = jax.jit(sampler.features)
    np.testing.assert_allclose(fast[field], features(frozen, live), atol=1e-5)
    np.testing.assert_array_equal(features(frozen, fast), fast[field])


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_training_on_stored_features_has_the_same_losses(make_config, tmp_path, name):
    rows = []
    for stored in ((), FIELDS[name]):
        for field in stored:
            precompute(make_config(name), field)
        folder = tmp_path / f"run{len(stored)}"
        assert train(make_config(name, *stored), folder) == EXIT_OK
        rows.append([{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)])
    assert len(rows[0]) == len(rows[1]) >= 4
    for live, fast in zip(*rows, strict=True):
        assert live.keys() == fast.keys()
        assert all(fast[key] == pytest.approx(live[key], rel=1e-3, abs=1e-5) for key in live), (live, fast)
