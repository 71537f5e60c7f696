"""Stored moments of latents and features of captions: those that training would compute, of every caption."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from configs.scenes import clip
from configs.scenes.ddpm_uvit import read_with_clip
from data.pipeline import load_tokenizer, open_stream
from data.row_writer import RowWriter
from data.tokenizer import Tokenizer
from sample.first_stage import FirstStage
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network
from scripts.precompute import main
from train.feature_pass import precompute
from train.loop import train
from train.objectives import create_objective
from train.precomputed import example_spec, locate_precomputed
from weights.run import read_metrics
from weights.sources import load_frozen

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("latent_moments", "text_features")
ENDS = (".npy", ".json", "-starts.npy")


@pytest.fixture
def make_config(scenes_dir, tmp_path):
    """`make_config(overrides...)`: a diffusion in latents told by a frozen CLIP, both random, on its own dataset."""
    shutil.copytree(scenes_dir, tmp_path / "data", ignore=shutil.ignore_patterns("precomputed"))

    def make(*overrides: str, stage: str = "autoencoder_kl"):
        name = f"--config={ROOT}/configs/scenes/latent_unet.py:debug"
        config = load_config([name, f"--config.data.data_dir={tmp_path}/data", *overrides])
        with config.unlocked():
            read_with_clip(config, clip.get_config("debug"))
            config.frozen.clip.source = "random"
            config.frozen.first_stage.name = stage
            config.data.split = "train[:40]"
            config.data.validation_split = "validation[:20]"
        return config

    return make


def store(config, tokenizer, names=FIELDS):
    """The config that reads what is stored of it."""
    config = config.copy_and_resolve_references()
    for name in names:
        precompute(config, name)
        config.data[name] = "auto"
    return locate_precomputed(config, tokenizer)


def moments_of(config, images):
    stage, frozen = FirstStage.from_config(config), load_frozen(config, config.seed)
    return jax.jit(lambda images: stage.moments(frozen, from_uint8(images)))(images)


def features_of(config, text):
    network, part = build_network(config, "frozen.clip"), load_frozen(config, config.seed)["clip"]
    tree = {"params": part["params"], **part["variables"]}
    return jax.jit(lambda text: network.apply(tree, text, method="encode_text"))(text)


def test_a_batch_has_what_its_pictures_and_captions_make_and_the_same_loss(make_config):
    config = make_config()
    tokenizer = load_tokenizer(config.data)
    cached = store(config, tokenizer)
    batches = {}
    for split, training in ((config.data.split, True), (config.data.validation_split, False)):
        live, fast = (
            open_stream(data, tokenizer, split=split, seed=3, train=training) for data in (config.data, cached.data)
        )
        indices = [0, 5, 39, 40, 123, 77, 60, 11]
        pictures, stored = live.batch(indices), fast.batch(indices)
        assert set(stored) == {*FIELDS, "text", "index"}
        np.testing.assert_array_equal(stored["text"], pictures["text"])
        np.testing.assert_array_equal(stored["latent_moments"], moments_of(config, pictures["image"]))
        np.testing.assert_array_equal(stored["text_features"], features_of(config, pictures["text"]))
        batches[training] = pictures, stored
    pictures, stored = batches[True]
    assert example_spec(cached) == {name: (value.shape[1:], value.dtype) for name, value in stored.items()}

    objective, frozen = create_objective(config), load_frozen(config, config.seed)

    @jax.jit
    def losses(rng, pictures, stored):
        params, _ = objective.init(rng, pictures)
        now = jnp.asarray(0)
        return [objective.loss(params, {}, frozen, batch, rng, now, True)[0] for batch in (pictures, stored)]

    live_loss, stored_loss = losses(jax.random.key(1), pictures, stored)
    # Blank captions are read one at a time beside stored features, and eight at a time without.
    assert float(stored_loss) == pytest.approx(float(live_loss), rel=1e-6)


def test_of_a_codebook_what_is_there_before_it_is_stored(make_config):
    config = make_config(stage="autoencoder_vq")
    cached = store(config, None, ("latent_moments",))
    live, fast = (
        open_stream(data, load_tokenizer(config.data), split=config.data.split, seed=3, train=True)
        for data in (config.data, cached.data)
    )
    moments = fast.batch(range(8))["latent_moments"]
    assert moments.shape[-1] == config.frozen.first_stage.latent_channels
    np.testing.assert_array_equal(moments, moments_of(config, live.batch(range(8))["image"]))


def test_captions_go_on_where_they_were_interrupted(make_config, monkeypatch):
    config = make_config()
    folder = precompute(config, "text_features", batch_size=32)
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    assert set(whole) == {
        "provenance.json",
        *(f"{split}-captions{end}" for split in ("train%5B%3A40%5D", "validation%5B%3A20%5D") for end in ENDS),
    }
    shutil.rmtree(folder)
    append, calls = RowWriter.append, []

    def failing(self, rows):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(rows))
        append(self, rows)

    monkeypatch.setattr(RowWriter, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        precompute(config, "text_features", batch_size=32)
    calls.clear()
    monkeypatch.setattr(RowWriter, "append", lambda self, rows: calls.append(len(rows)) or append(self, rows))
    precompute(config, "text_features", batch_size=32)
    assert sum(calls) == len(np.load(folder / "train%5B%3A40%5D-captions.npy")) - 64 + 140
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == whole


def test_what_is_of_something_else_is_refused_in_one_line(make_config):
    config, tokenizer = make_config(), load_tokenizer(make_config().data)
    folder = precompute(config, "text_features")

    def refused(message, *overrides, tokenizer=tokenizer, where="auto"):
        changed = make_config(*overrides)
        changed.data.text_features = str(where)
        with pytest.raises(UserError, match=message) as raised:
            located = locate_precomputed(changed, tokenizer)
            open_stream(located.data, tokenizer, split=changed.data.split, seed=0, train=True)
        assert "\n" not in str(raised.value)

    refused(r"config.data.bpe_dropout=0.5 makes another text .* set it to 0", "--config.data.bpe_dropout=0.5")
    refused("is made of captions, and config.data.text_length is 0", tokenizer=None)
    refused(f"no text_features of config.frozen.clip are stored in .*there are {folder.name}", "--config.seed=1")
    trained = Tokenizer.train(["a small red circle"], 300).with_ends()
    refused(f"is of tokenizer {tokenizer.digest}, not {trained.digest}", tokenizer=trained, where=folder)
    starts = np.load(folder / "train%5B%3A40%5D-captions-starts.npy")
    np.save(folder / "train%5B%3A40%5D-captions-starts.npy", starts[:-1])
    refused(r"train%5B%3A40%5D-captions.npy is damaged \(\d+ captions, not \d+\); remove it")
    name = f"--config={ROOT}/configs/scenes/latent_unet.py:debug"
    for wrong, message in (
        (["--fields=text_features"], "--fields has text_features; of this config there can be latent_moments"),
        (["--views=2"], "draws nothing, so there is one view"),
    ):
        with pytest.raises(UserError, match=message):
            main([name, f"--config.data.data_dir={config.data.data_dir}", *wrong])


def test_what_was_given_up_is_said(make_config):
    config = make_config("--config.data.transform=dvae_training")
    config.data.latent_moments = str(precompute(config, "latent_moments", views=2))
    stream = open_stream(config.data, None, split=config.data.split, seed=0, train=True)
    assert stream.given_up == (
        "config.data.latent_moments: dvae_training shows a picture in 2 stored ways, in turn by epoch, and draws none "
        "anew",
    )
    config.data.latent_moments = ""
    assert not open_stream(config.data, None, split=config.data.split, seed=0, train=True).given_up


@pytest.mark.slow
def test_a_run_on_stored_moments_has_the_losses_and_pictures_of_one_on_pictures(scenes_dir, tmp_path):
    shutil.copytree(scenes_dir, tmp_path / "data", ignore=shutil.ignore_patterns("precomputed"))
    options = [f"--config={ROOT}/configs/scenes/latent_unet.py:debug", f"--config.data.data_dir={tmp_path}/data"]
    precompute(load_config(options), "latent_moments")
    rows, pictures = [], []
    for stored in ("", "auto"):
        folder = tmp_path / f"run{stored}"
        assert train(load_config([*options, f"--config.data.latent_moments={stored}"]), folder) == EXIT_OK
        rows.append([{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)])
        pictures.append({path.name: path.read_bytes() for path in (folder / "samples").glob("*.png")})
    assert rows[0] == rows[1] and len(rows[0]) >= 4
    assert pictures[0] == pictures[1] and pictures[0]
