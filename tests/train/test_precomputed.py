"""Stored image tokens: the ones that training would compute, interrupted or not, and never those of something else."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from cli.locations import locate
from data.pipeline import load_tokenizer, open_stream
from data.preprocess import dalle_training
from data.records import RecordSource
from data.row_writer import Claim, RowWriter, open_writer
from models import create_model
from sample.samplers.dvae import from_uint8
from scripts.precompute import main
from train import feature_pass
from train.feature_pass import _VIEW_SEED, precompute
from train.loop import train
from train.precomputed import locate_precomputed, weights_of
from weights import sources
from weights.pretrained import write_pretrained
from weights.run import model_of, read_metrics
from weights.sources import Part, load_frozen, random_part, resolve_frozen

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make_config(scenes_dir, tmp_path):
    """`make_config(overrides...)`: DALL-E's debug config on a copy of the dataset, which the test may write to.

    Its tokenizer is a discrete VAE, which has many codes for a picture also with random weights.
    """
    shutil.copytree(scenes_dir, tmp_path / "data", ignore=shutil.ignore_patterns("precomputed"))

    def make(*overrides: str):
        name = f"--config={ROOT}/configs/scenes/dalle.py:debug"
        config = load_config([name, f"--config.data.data_dir={tmp_path}/data", *overrides])
        with config.unlocked():
            config.frozen.dvae.name = "dvae"
            del config.frozen.dvae.code_dim
        return config

    return make


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def tokens_of(config, images):
    """What the frozen tokenizer makes of pictures."""
    part = load_frozen(config, config.seed)["dvae"]
    network = create_model(**model_of(config.frozen.dvae))
    variables = {"params": part["params"], **part["variables"]}
    apply = jax.jit(lambda x: network.apply(variables, from_uint8(x), method="tokenize"))
    return np.asarray(apply(images)).reshape(len(images), -1)


def test_the_stream_has_the_tokens_of_its_pictures_and_the_same_captions(make_config):
    config = make_config("--config.data.bpe_dropout=0.3")
    folder = precompute(config, "image_tokens")
    assert folder.parent.name == "image_tokens" and folder.name.endswith("-32px")
    config.data.image_tokens = "auto"
    located, tokenizer = locate_precomputed(config, None), load_tokenizer(config.data)
    assert located.data.image_tokens == str(folder) and config.data.image_tokens == "auto"
    for split, training in (("train", True), ("validation", False)):
        live, cached = (
            open_stream(data, tokenizer, split=split, seed=3, train=training)
            for data in (make_config("--config.data.bpe_dropout=0.3").data, located.data)
        )
        indices = [0, 5, 299, 300, 1234]
        pictures, fast = live.batch(indices), cached.batch(indices)
        assert set(fast) == {"image_tokens", "text", "index"} and fast["image_tokens"].dtype == np.int32
        np.testing.assert_array_equal(fast["image_tokens"], tokens_of(config, pictures["image"]))
        assert len(np.unique(fast["image_tokens"])) > 3
        for name in ("text", "index"):
            np.testing.assert_array_equal(fast[name], pictures[name])
    made = json.loads((folder / "provenance.json").read_text())
    assert (made["dataset"], made["image_size"], made["source"]) == ("scenes/single32/1.0.0", 32, "random")
    assert len(made["weights"]) == 64 and made["code"]["packages"]["jax"]


@pytest.mark.slow
def test_training_on_stored_tokens_has_the_same_losses_to_the_bit(make_config, tmp_path):
    precompute(make_config(), "image_tokens")
    rows = {}
    for tokens in ("", "auto"):
        folder = tmp_path / f"run{tokens}"
        assert train(make_config(f"--config.data.image_tokens={tokens}"), folder) == EXIT_OK
        metrics = read_metrics(folder)
        rows[tokens] = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics]
    assert rows[""] == rows["auto"] and len(rows[""]) >= 4


def test_an_interrupted_one_goes_on_and_ends_with_the_same_bytes(make_config, monkeypatch, capsys):
    config = make_config()
    folder = precompute(config, "image_tokens", batch_size=32)
    whole = stored(folder)
    shutil.rmtree(folder)
    append, calls = RowWriter.append, []

    def failing(self, rows):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(rows))
        append(self, rows)

    monkeypatch.setattr(RowWriter, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        precompute(config, "image_tokens", batch_size=32)
    (part,) = folder.glob("*.part")
    with part.open("ab") as file:  # half a row, as a kill leaves it
        file.write(b"\1\2\3")
    config.data.image_tokens = str(folder)
    with pytest.raises(UserError, match=r"is not complete .*run `python -m scripts.precompute` with this config"):
        open_stream(config.data, load_tokenizer(config.data), split="train", seed=0, train=True)
    calls.clear()
    monkeypatch.setattr(RowWriter, "append", lambda self, rows: calls.append(len(rows)) or append(self, rows))
    precompute(config, "image_tokens", batch_size=32)
    assert sum(calls) == 300 - 3 * 32 + 60  # no more than what was missing
    assert stored(folder) == whole
    calls.clear()
    assert precompute(config, "image_tokens") == folder and not calls
    assert "all 300 are there" in capsys.readouterr().out


def test_in_a_store_parts_become_the_same_file(object_store, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("data.row_writer._PART_BYTES", 2 * 32 * 6)  # two batches
    rows = np.random.default_rng(0).integers(0, 2**16, (100, 3), np.uint16)
    shape = {"shape": (100, 1, 3), "dtype": rows.dtype, "depth": 2, "whole": 32}
    names = [f"{bucket}/tokens/rows.npy.part-{row:012d}" for row in (0, 64)]

    def write(path, stop=100):
        writer = open_writer(path, **shape)
        first = writer.done
        for start in range(first, stop, 32):
            writer.append(rows[start : start + 32])
        if stop == 100:
            writer.finish()
        return first

    assert write(tmp_path / "rows.npy") == 0
    whole, there = (tmp_path / "rows.npy").read_bytes(), locate(f"gs://{bucket}/tokens/rows.npy")
    write(there, stop=96)  # and then it is killed: a batch had not been put
    assert object_store.names(f"{bucket}/tokens/") == ["rows.npy.part-000000000000"]
    with pytest.raises(UserError, match="was begun for another shape than"):
        open_writer(there, **{**shape, "shape": (100, 2, 3)})
    object_store.put(f"{bucket}/tokens/rows.npy", whole[:-1])  # it was being put together when all stopped
    assert write(there) == 64
    assert object_store[f"{bucket}/tokens/rows.npy"] == whole and object_store.names(f"{bucket}/tokens/") == [
        "rows.npy"
    ]
    object_store.put(names[1], b"of another process that was late")
    assert write(there) == 100 and object_store.names(f"{bucket}/tokens/") == ["rows.npy"]
    assert object_store[f"{bucket}/tokens/rows.npy"] == whole


def test_in_a_store_a_second_writer_ends_in_one_line_unless_the_first_is_gone(object_store, bucket, monkeypatch):
    monkeypatch.setattr("data.row_writer._CLAIM_SECONDS", 0.1)
    folder, lock = locate(f"gs://{bucket}/tokens"), f"{bucket}/tokens/lock"
    with contextlib.closing(Claim(folder)) as first:
        time.sleep(0.5)
        with pytest.raises(
            UserError, match=r"another process is writing gs://.* \(process \d+ of .* ago\); wait for it"
        ):
            monkeypatch.setattr("data.row_writer._CLAIM_SECONDS", 60)
            Claim(folder)
        first.check()
    assert lock not in object_store.objects
    object_store.put(lock, b"{}")  # of a process that was killed
    monkeypatch.setattr("data.row_writer._CLAIM_SECONDS", 0.1)
    time.sleep(1.4)  # times are whole seconds
    with contextlib.closing(Claim(folder)) as second:
        object_store.put(lock, b"{}")  # another one held this one for gone
        second._thread.join(5)
        with pytest.raises(UserError, match="another process writes gs://.* now; wait for it"):
            second.check()
    assert object_store[lock] == b"{}"


@pytest.mark.slow
def test_tokens_in_a_store_are_those_of_this_machine(make_config, object_store, bucket, tmp_path):
    config = make_config()
    folder = precompute(config, "image_tokens")
    whole = stored(folder)
    shutil.rmtree(folder)
    object_store.put_folder(f"{bucket}/data", tmp_path / "data")
    config.data.data_dir = f"gs://{bucket}/data"
    there = precompute(config, "image_tokens")
    assert str(there) == f"gs://{bucket}/{folder.relative_to(tmp_path)}"
    place = f"{bucket}/{folder.relative_to(tmp_path)}/"
    assert {name: object_store[place + name] for name in object_store.names(place)} == whole
    config.data.image_tokens = "auto"
    located = locate_precomputed(config, None)
    assert located.data.image_tokens == str(there)
    stream = open_stream(located.data, load_tokenizer(config.data), split="train", seed=0, train=False)
    tokens = np.load(io.BytesIO(whole["train-center_square.npy"]))
    np.testing.assert_array_equal(stream.batch(range(16))["image_tokens"], tokens[:16, 0])


def test_a_transform_that_draws_needs_a_number_of_views_and_epochs_take_turns(make_config):
    config = make_config("--config.data.transform=dalle_training", "--config.data.image_size=16")
    with config.unlocked():
        config.frozen.dvae.image_size = 16
    with pytest.raises(UserError, match="draws anew in every epoch; say how many views .* with --views=K") as raised:
        precompute(config, "image_tokens")
    assert "\n" not in str(raised.value)
    folder = precompute(config, "image_tokens", views=2)
    config.data.image_tokens = str(folder)
    stream = open_stream(config.data, load_tokenizer(config.data), split="train", seed=1, train=True)
    place = stream.place(7)
    later = next(index for index in range(300, 600) if stream.place(index) == place)
    third = next(index for index in range(600, 900) if stream.place(index) == place)
    picture = RecordSource("scenes/single32", "train", config.data.data_dir)[place]["image"]
    views = [dalle_training(picture, 16, np.random.default_rng((_VIEW_SEED, place, view))) for view in (0, 1)]
    assert (views[0] != views[1]).any()
    expected = tokens_of(config, np.stack([views[0], views[1], views[0]]))
    np.testing.assert_array_equal(stream.batch([7, later, third])["image_tokens"], expected)
    with pytest.raises(UserError, match="was begun for another shape than .*another --views"):
        precompute(config, "image_tokens", views=3)
    config.data.transform = "center_square"
    with pytest.raises(UserError, match="draws nothing, so there is one view; leave out --views"):
        precompute(config, "image_tokens", views=2)


def test_what_is_stale_is_refused_in_one_line(make_config, tmp_path):
    config = make_config()
    folder = precompute(config, "image_tokens")

    def refused(message, *overrides, tokens="auto", size=32):
        changed = make_config(*overrides, f"--config.data.image_tokens={tokens}", f"--config.data.image_size={size}")
        with changed.unlocked():
            changed.frozen.dvae.image_size = size
        with pytest.raises(UserError, match=message) as raised:
            located = locate_precomputed(changed, None)
            open_stream(located.data, load_tokenizer(located.data), split=located.data.split, seed=0, train=True)
        assert "\n" not in str(raised.value) and "scripts.precompute" in str(raised.value)

    other_weights = "--config.seed=1"  # random weights follow the seed
    refused(f"no image_tokens of config.frozen.dvae are stored in .*there are {folder.name}; run", other_weights)
    refused(
        r"has image_tokens of other weights \(random, step 0\) than config.frozen.dvae", other_weights, tokens=folder
    )
    refused("train-dvae_training.npy is missing", "--config.data.transform=dvae_training")
    refused("train%5B%3A50%25%5D-center_square.npy is missing", "--config.data.split=train[:50%]")
    refused("no image_tokens of config.frozen.dvae are stored", size=16)
    refused("no image_tokens of config.frozen.dvae are stored", tokens=tmp_path)
    draft = "--config.data.draft=True"  # JPEGs are decoded near a side that the transform decides
    refused("is of draft 0, not 32", draft, tokens=folder)
    refused(f"are stored in .*/{folder.name}-draft36; of other", draft, "--config.data.transform=dalle_training")
    provenance = json.loads((folder / "provenance.json").read_text())
    for key, value in (("image_size", 64), ("dataset", "scenes/single32/0.9.0")):
        (folder / "provenance.json").write_text(json.dumps({**provenance, key: value}))
        refused(f"is of {key} {value}, not ")
        with pytest.raises(UserError, match=f"is of {key} {value}, not .*; remove it"):
            precompute(config, "image_tokens")
    (folder / "provenance.json").write_text(json.dumps(provenance))
    notes = folder / "train-center_square.json"
    kept = notes.read_bytes()
    notes.unlink()
    refused("train-center_square.npy is damaged")
    with pytest.raises(UserError, match=r"train-center_square.json, .*, is missing; remove .*-center_square.npy\* to"):
        precompute(config, "image_tokens")
    notes.write_bytes(kept)
    rows = np.load(folder / "train-center_square.npy")
    np.save(folder / "train-center_square.npy", rows[:-1])
    refused("has 299 records, but the split has 300; remove it")
    np.save(folder / "train-center_square.npy", rows)
    for size in (rows.nbytes, 100):  # cut in its last row, and in its header
        os.truncate(folder / "train-center_square.npy", size)
        refused("is damaged")
        with pytest.raises(UserError, match=r"train-center_square.npy is damaged: it holds \d+ of 300 rows; remove it"):
            precompute(config, "image_tokens")
    (folder / "train-center_square.npy").write_bytes(b"no array")
    refused("is damaged")


def test_the_network_that_computes_names_what_is_stored(tmp_path):
    """Its source may leave open what it computes in, and the config says that."""
    fields = {"name": "dvae", "image_size": 8, "encoder_hidden": 4, "decoder_hidden": 4, "decoder_init": 4}
    fields |= {"vocab_size": 4, "width_multipliers": (1,), "blocks_per_group": 1}
    part = Part(fields, **jax.jit(lambda: random_part(fields, 0).trees())())
    described = {"objective": "dvae", "models": {"dvae": fields}}
    write_pretrained(tmp_path / "dvae", described, {"dvae": part.params}, {}, provenance={})
    hashes = {}
    for dtype in ("float32", "bfloat16"):
        entry = {"name": "dvae", "dtype": dtype, "source": str(tmp_path / "dvae"), "part": "dvae", "step": 0}
        config = ConfigDict({"seed": 0, "frozen": {"dvae": entry}})
        resolve_frozen(config)
        hashes[dtype] = weights_of(config, "dvae")
    assert hashes["float32"] != hashes["bfloat16"]


def test_a_picture_that_cannot_be_read_is_replaced_together_with_its_caption(make_config, monkeypatch):
    config, fetch = make_config(), RecordSource._fetch

    def broken(self, place):
        if place in (4, 5) and self._split == "train" and "image" in self._parser._kinds:
            raise ValueError("broken bytes")
        return fetch(self, place)

    monkeypatch.setattr(RecordSource, "_fetch", broken)
    folder = precompute(config, "image_tokens")
    assert json.loads((folder / "train-center_square.json").read_text()) == {"damaged": [4, 5]}
    tokenizer = load_tokenizer(config.data)
    live = open_stream(config.data, tokenizer, split="train", seed=0, train=True)
    config.data.image_tokens = str(folder)
    cached = open_stream(config.data, tokenizer, split="train", seed=0, train=True)
    for place in (4, 5, 6):
        index = live_index(live, place)
        np.testing.assert_array_equal(cached[index]["text"], live[index]["text"])
        np.testing.assert_array_equal(cached[index]["image_tokens"], cached[live_index(live, 6)]["image_tokens"])


def live_index(stream, place):
    return next(index for index in range(300) if stream.place(index) == place)


def test_the_command_stores_and_says_where(make_config, tmp_path, capsys, caplog):
    make_config()
    sources._warn_of_random.cache_clear()
    command = [f"--config={ROOT}/configs/scenes/dalle.py:debug", f"--config.data.data_dir={tmp_path}/data"]
    main([*command, "--splits=held_out", "--batch_size=7"])
    assert [record.getMessage() for record in caplog.records if "random" in record.getMessage()] == [
        "part 'dvae' has random weights, as its source says"
    ]
    out = capsys.readouterr().out
    assert "image_tokens of held_out: picture 40/40" in out and "--config.data.image_tokens=auto" in out
    (file,) = (tmp_path / "data").glob("**/held_out-center_square.npy")
    assert np.load(file).shape == (40, 1, 64)
    for wrong, message in (
        (["--views=2"], "draws nothing"),
        (["--batch_size=0"], "must be at least 1"),
        (["--splits=validation", "--views=2", "--config.data.transform=dalle_training"], "leave out --views"),
        (["--splits=nope"], "has no split 'nope'"),
    ):
        with pytest.raises(UserError, match=message):
            main([*command, *wrong])
    with pytest.raises(UserError, match="this vqvae has nothing that can be precomputed"):
        main([f"--config={ROOT}/configs/scenes/dvae.py:debug"])


def test_two_at_once_are_told_apart(make_config, monkeypatch):
    config = make_config()

    def second(*_, **__):
        monkeypatch.undo()
        precompute(config, "image_tokens")

    monkeypatch.setattr(feature_pass, "_write_provenance", second)
    with pytest.raises(UserError, match="another process is writing"):
        precompute(config, "image_tokens")


@pytest.mark.slow
def test_several_devices_store_the_same(make_config, tmp_path):
    folder = precompute(make_config(), "image_tokens", batch_size=32)
    whole = stored(folder)
    shutil.rmtree(folder)
    (tmp_path / "config.py").write_text(
        "from configs.scenes import dalle\n"
        "def get_config(argument):\n"
        "    config = dalle.get_config('debug')\n"
        "    with config.unlocked():\n"
        "        config.frozen.dvae.name = 'dvae'\n"
        "        del config.frozen.dvae.code_dim\n"
        "    return config\n"
    )
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    command = [f"--config={tmp_path}/config.py", f"--config.data.data_dir={tmp_path}/data", "--batch_size=30"]
    for mesh in (["--config.mesh.fsdp=2"], ["--config.mesh.fsdp=4", "--config.mesh.data=1"]):
        subprocess.run(
            [sys.executable, "-m", "scripts.precompute", *command, *mesh],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags},
            check=True,
        )
        there = stored(folder)
        for name in ("train-center_square.npy", "validation-center_square.npy"):
            assert there[name] == whole[name]
        shutil.rmtree(folder)
