"""Where sources are looked for: where a config says, and beside the run that names them."""

from pathlib import Path

import pytest

from cli import locations
from cli.errors import UserError
from cli.locations import locate
from weights.sources import find_source

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
