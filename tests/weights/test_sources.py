"""Where sources are looked for: where a config says, and beside the run that names them."""

import json
from pathlib import Path

import pytest

from cli import locations
from cli.config import load_config, to_json
from cli.errors import UserError
from cli.locations import locate
from weights.sources import find_source, resolve_frozen

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
