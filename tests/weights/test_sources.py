"""Where sources are looked for: where a config says, and beside the run that names them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli import locations
from cli.config import load_config, to_json
from cli.errors import UserError
from cli.locations import locate
from scripts.convert import main as convert
from weights.files.tensors import read_tensors
from weights.pretrained import write_pretrained
from weights.sources import find_source, load_part, random_part, resolve_frozen
from weights.starts import starts_of

from ..object_store import ObjectStore


def test_runs_that_were_moved_from_a_store_are_found_without_it(object_store: ObjectStore, bucket: str, tmp_path: Path):
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    object_store.unknown = True
    locations._reach.cache_clear()
    assert find_source(f"gs://{bucket}/runs/stage1", near=tmp_path / "stage2") == str(tmp_path / "stage1")
    with pytest.raises(UserError, match="no credentials for gs:// were found"):
        find_source(f"gs://{bucket}/runs/gone", near=tmp_path / "stage2")


def test_beside_a_bucket_nothing_is_looked_for(object_store: ObjectStore, bucket: str):
    object_store.put(f"{bucket}/config.json", b"{}")
    object_store.requests.clear()
    with pytest.raises(UserError, match=r"the source runs/dvae is missing \(looked in runs/dvae\)"):
        find_source("runs/dvae", near=locate(f"gs://{bucket}"))
    assert not any("dvae" in request for request in object_store.requests)


def test_a_captioner_goes_with_the_clip_that_it_was_trained_on(tmp_path: Path):
    clip = load_config(["--config=configs/scenes/clip.py:debug"])
    for name in ("one", "two"):  # equally large ones
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(clip))
        (tmp_path / name / "provenance.json").write_text(json.dumps({"sha256": name}))
    captioner = load_config(["--config=configs/scenes/captioner.py:debug"])
    captioner.frozen.clip.source = str(tmp_path / "one")
    resolve_frozen(captioner)
    (tmp_path / "captioner").mkdir()
    (tmp_path / "captioner" / "config.json").write_text(to_json(captioner))
    (tmp_path / "captioner" / "provenance.json").write_text(json.dumps({"sha256": "captioner"}))

    def found(source: str) -> None:
        config = load_config(["--config=configs/scenes/unidiffuser.py:debug"])
        config.frozen.captioner.source, config.frozen.clip.source = str(tmp_path / "captioner"), source
        resolve_frozen(config)

    found(str(tmp_path / "one"))
    found("random")
    with pytest.raises(UserError, match=r"captioner was trained on clip of .*one at step 0, and .*clip is of .*two"):
        found(str(tmp_path / "two"))


def test_a_network_within_another_is_a_source_by_its_path(tmp_path: Path):
    clipcap = load_config(["--config=configs/scenes/captioner.py:debug_mlp"]).models.captioner.to_dict()
    params = jax.jit(lambda: random_part(clipcap, 0).params)()
    source = tmp_path / "clipcap"
    recipe = {"objective": "captioner", "models": {"captioner": clipcap}}
    write_pretrained(source, recipe, {"captioner": params}, {}, provenance={"format": "made up"})

    config = load_config(["--config=configs/scenes/captioner.py:debug"])  # another mapper, the same GPT-2
    entry = config.initialize.language
    entry.source, entry.part = str(source), "captioner/language"
    (start,) = starts_of(config)
    jax.tree.map(np.testing.assert_array_equal, start.load(config).params, params["language"])
    for part, said in {
        "captioner/words": "captioner has no network 'words' within it; it has language",
        "words/language": "has no part 'words'; it has captioner",
        "captioner": "name: 'captioner', not 'gpt2'",
    }.items():
        entry.part = part
        with pytest.raises(UserError, match=said):
            start.load(config)

    frozen = ConfigDict({"source": str(source), "part": "captioner/language"})
    assert load_part(frozen).model["name"] == "gpt2"
    command = [f"--run={source}", "--part=captioner/language", "--to=transformers", f"--output={tmp_path / 'gpt2'}"]
    convert(command)
    assert "transformer.wte.weight" in read_tensors(tmp_path / "gpt2" / "model.safetensors")
