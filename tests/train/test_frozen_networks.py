"""What captioners and UniDiffuser leave as it is, over updates; and captioners with a vocabulary of their own."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from cost.measured import made_up_batch
from data.pipeline import batch_spec, load_tokenizer, load_writer, open_stream
from data.tally import TRUNCATED
from data.tokenizer import Tokenizer
from sample.trained import TrainedSampler
from train.distributed.mesh import make_mesh
from train.distributed.sharding import path_name
from train.loop import train
from train.program import create_program
from weights.checkpoint import CheckpointStore
from weights.run import TOKENIZER, WRITES_WITH, Run, read_metrics
from weights.sources import load_frozen

ROOT = Path(__file__).resolve().parents[2]


def leaves(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """GPT-2's way of cutting texts, with letters alone: 28 ids, the last of which ends captions."""
    folder = tmp_path_factory.mktemp("vocabulary")
    pieces = ["!", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: place for place, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    Tokenizer.from_gpt2_vocabulary(folder / "vocab.json", folder / "merges.txt", 29).save(folder / "writes.json")
    return folder / "writes.json"


def test_a_captioner_with_a_vocabulary_of_its_own_learns_by_its_mapper_alone(scenes_dir, vocabulary, tmp_path):
    settings = ("steps=3", "trainable=('^captioner/(?!language/)',)", f"data.data_dir={scenes_dir}")
    settings += (f"data.writes_with={vocabulary}", "data.written_length=40", "ema.decay=0.9")
    settings += ("models.captioner.text_vocab_size=29", "models.captioner.text_end_id=28")
    config = load_config(
        [f"--config={ROOT}/configs/scenes/captioner.py:debug_mlp", *(f"--config.{each}" for each in settings)]
    )
    assert train(config, tmp_path / "run") == EXIT_OK
    program = create_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    with program.in_mesh():
        start = leaves(program.init(made_up_batch(program, config)).params)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    end = store.load(3, ("params", "ema_params", "opt_state"))
    held = {path for path in start if path.startswith("captioner/language/")}
    for path, leaf in leaves(end["params"]).items():
        assert np.array_equal(leaf, start[path]) == (path in held), path
    kept = [*leaves(end["ema_params"]), *leaves(end["opt_state"])]
    assert kept and not any("language" in path for path in kept)

    # Captions are read with one tokenizer and written with the other, and the folder holds both.
    trained = TrainedSampler.open(tmp_path / "run", chunk=2)
    assert Tokenizer.load(tmp_path / "run" / TOKENIZER).vocab_size == 353
    assert Tokenizer.load(tmp_path / "run" / WRITES_WITH).digest == Tokenizer.load(vocabulary).digest
    image = np.zeros((1, 32, 32, 3), np.uint8)
    written = trained({"image": image}, seed=0, indices=[0], caption_length=5)["text"]
    assert written.max() < 29 and trained.decode(np.array([[1, 27, 2, 28, 0]])) == ("a b",)


def test_the_same_caption_comes_in_both_vocabularies(scenes_dir, vocabulary):
    settings = (f"data.data_dir={scenes_dir}", f"data.writes_with={vocabulary}", "data.written_length=30")
    data = load_config(
        [f"--config={ROOT}/configs/scenes/captioner.py:debug", *(f"--config.{each}" for each in settings)]
    ).data
    reader, writer = load_tokenizer(data), load_writer(data)
    stream = open_stream(data, reader, split="train", seed=0, train=True, writer=writer)
    batch = stream.batch(range(4))
    assert batch_spec(data)["written"] == (batch["written"].shape[1:], batch["written"].dtype) == ((30,), np.int32)
    for text, written in zip(batch["text"], batch["written"], strict=True):
        assert written[-1] in (0, 28) and reader.decode(text).startswith(writer.decode(written)[:25])
    cut = [written[-1] == 28 for written in batch["written"]]
    assert len(stream.tally.places(TRUNCATED)) == sum(cut) > 0  # longer than 29 letters, with their end kept
    with pytest.raises(UserError, match="does not end captions"):
        load_writer(data_with(data, Tokenizer.train(["a b"], 270), vocabulary.parent))


def data_with(data, tokenizer, folder):
    tokenizer.save(folder / "endless.json")
    changed = data.copy_and_resolve_references()
    with changed.unlocked():
        changed.writes_with = str(folder / "endless.json")
    return changed


def test_unidiffuser_s_frozen_networks_are_their_sources_bits_and_have_no_state(debug_run):
    """And scales are measured once, before the first update, of the first examples of the stream."""
    folder = debug_run("scenes/unidiffuser.py")
    stores = CheckpointStore(folder / "checkpoints")
    stored = stores.load(4, ("params", "ema_params", "opt_state", "variables"))
    config = Run.open(folder).config
    program = create_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    sampler, frozen, before = program.objective.sampler, load_frozen(config), leaves(load_frozen(config))
    stream = open_stream(config.data, load_tokenizer(config.data), split="train", seed=config.seed, train=True)
    batches = [
        {name: jnp.asarray(value) for name, value in stream.batch(range(*rows)).items()} for rows in ((0, 8), (8, 16))
    ]
    with program.in_mesh():
        state = program.init(batches[0])
        start = leaves(state.params)
        state, metrics, _ = program.train_step(state, frozen, batches[0])
        for batch in batches:
            state, _, _ = program.train_step(state, frozen, batch)
    for path, leaf in leaves(frozen).items():
        np.testing.assert_array_equal(leaf, before[path])
    assert not any(np.array_equal(leaf, start[path]) for path, leaf in leaves(state.params).items())
    for tree in (stored["params"], stored["ema_params"]):
        assert set(tree) == {"unidiffuser"}
    assert not any(part in path for path in leaves(stored["opt_state"]) for part in ("first_stage", "captioner"))

    # Nothing was measured here, so that the mean square is logged as it is.
    measured = stored["variables"]["unidiffuser"]["statistics"]
    assert float(measured["count"]) == 2
    encode = jax.jit(
        lambda frozen, batch: {
            "clip": sampler.embed(frozen, batch["image"]),
            **sampler.encode_text(frozen, batch["text"]),
        }
    )
    squares = [{name: np.mean(np.square(value)) for name, value in encode(frozen, batch).items()} for batch in batches]
    for name in ("clip", "text"):
        assert float(measured[name]) == pytest.approx(np.mean([each[name] for each in squares]), rel=1e-5)
    factors = sampler.factors(stored["variables"])
    assert float(factors["clip"]) == pytest.approx(float(measured["clip"]) ** -0.5, rel=1e-5)
    logged = [row for row in read_metrics(folder) if "power_clip" in row][0]
    assert 0.3 < logged["power_clip"] < 3 and 0.3 < logged["power_text"] < 3
    total, count = metrics["power_clip"]
    assert float(total / count) == pytest.approx(squares[0]["clip"], rel=1e-5)
