"""`python -m scripts.convert` from and to a store of objects; tables of sweeps there."""

from pathlib import Path

import pytest

import models
from cli.errors import UserError
from cli.locations import locate
from sample.sheets.sweep import append_row
from scripts.convert import main as convert
from weights.files.tensors import write_tensors
from weights.formats import dall_e
from weights.run import Run

from ..models.random_parameters import random_parameters
from ..object_store import ObjectStore
from ..weights.clip_samples import assert_same_trees


def test_weights_of_others_come_from_a_store_and_go_there(
    object_store: ObjectStore, bucket: str, tmp_path: Path, capsys
):
    params = random_parameters(models.create_model("dvae", vocab_size=16, encoder_hidden=8, decoder_hidden=8))
    for side, tensors in zip(("encoder", "decoder"), dall_e.to_dall_e(params), strict=True):
        write_tensors(tmp_path / "theirs" / f"{side}.safetensors", tensors)
    object_store.put_folder(f"{bucket}/theirs", tmp_path / "theirs")
    there = f"gs://{bucket}/ours"
    object_store.forbidden = "POST .*config.json"
    with pytest.raises(OSError, match="Forbidden"):
        convert([f"--input=gs://{bucket}/theirs", f"--output={there}"])
    with pytest.raises(UserError, match="no run folder|config.json"):
        Run.open(there)
    object_store.forbidden = ""
    with pytest.raises(UserError, match=f"{there} is not empty; choose another --output"):
        convert([f"--input=gs://{bucket}/theirs", f"--output={there}"])
    convert([f"--input=gs://{bucket}/theirs", f"--output={there}/again"])
    assert f"{there}/again: dall_e; part 'dvae'" in capsys.readouterr().out
    run = Run.open(f"{there}/again")
    assert_same_trees(run.load().params["dvae"], params)
    assert f"gs://{bucket}/theirs" in object_store[f"{bucket}/ours/again/provenance.json"].decode()
    convert(["--to=dall_e", f"--run={there}/again", f"--output=gs://{bucket}/back"])
    for name in ("encoder.safetensors", "decoder.safetensors"):
        assert object_store[f"{bucket}/back/{name}"] == (tmp_path / "theirs" / name).read_bytes()
    assert not list((tmp_path / "cache" / "tessera" / "outputs").iterdir())
    with pytest.raises(UserError, match=f"gs://{bucket}/theirs/encoder.safetensors is half of a discrete VAE"):
        convert(["--source=dall_e", f"--input=gs://{bucket}/theirs/encoder.safetensors", f"--output={tmp_path}/none"])
    with pytest.raises(UserError, match=f"there is no folder or file gs://{bucket}/nothing"):
        convert([f"--input=gs://{bucket}/nothing", f"--output={tmp_path}/none"])


def test_a_table_of_a_sweep_grows_in_a_store(object_store: ObjectStore, bucket: str, tmp_path: Path):
    for table in (locate(f"gs://{bucket}/sweep.csv"), tmp_path / "sweep.csv"):
        append_row(table, ["a", "b, c"], new=True)
        append_row(table, [1, 0.5])
    assert object_store[f"{bucket}/sweep.csv"] == (tmp_path / "sweep.csv").read_bytes() == b'a,"b, c"\r\n1,0.5\r\n'
