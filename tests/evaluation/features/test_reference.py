"""Stored features are read only for what they were computed from, and only whole."""

import json

import numpy as np
import pytest

from cli.errors import UserError
from evaluation.features.reference import FeatureStore, dataset_provenance, default_folder

PROVENANCE = {"format": 1, "dataset": "scenes/single32/1.0.0", "split": "validation", "num": 3, "features": "a"}


class Counted:
    """Computes features and counts how often."""

    def __init__(self, keep=True):
        self.calls, self.keep = 0, keep

    def __call__(self):
        self.calls += 1
        return np.full((3, 2), self.calls, np.float32), self.keep


def test_features_are_computed_once(tmp_path):
    compute = Counted()
    first = FeatureStore(tmp_path / "new").get(PROVENANCE, compute)
    second = FeatureStore(tmp_path / "new").get(dict(reversed(PROVENANCE.items())), compute)
    assert compute.calls == 1 and first.dtype == second.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("key", PROVENANCE)
def test_any_other_provenance_is_computed_anew(key, tmp_path):
    compute, store = Counted(), FeatureStore(tmp_path)
    store.get(PROVENANCE, compute)
    other = {**PROVENANCE, key: 3 if key == "num" else "another"}
    if key == "num":
        other["num"] = 30
        with_thirty = store.get(other, lambda: (np.zeros((30, 2), np.float32), True))
        assert len(with_thirty) == 30
    else:
        assert store.get(other, compute)[0, 0] == 2
    assert store.get(PROVENANCE, compute)[0, 0] == 1


def test_a_file_of_other_features_under_this_name_is_refused(tmp_path):
    store = FeatureStore(tmp_path)
    other = {**PROVENANCE, "features": "b"}
    store.get(other, Counted())
    store.path(other).rename(store.path(PROVENANCE))
    with pytest.raises(UserError, match='holds other features.*"features": "b".*delete it'):
        store.get(PROVENANCE, Counted())


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_a_cut_file_does_not_count_and_is_replaced(keep, tmp_path, capsys):
    compute, store = Counted(), FeatureStore(tmp_path)
    store.get(PROVENANCE, compute)
    data = store.path(PROVENANCE).read_bytes()
    store.path(PROVENANCE).write_bytes(data[:keep])
    assert store.get(PROVENANCE, compute)[0, 0] == 2 and "is damaged" in capsys.readouterr().out
    assert store.get(PROVENANCE, compute)[0, 0] == 2 and compute.calls == 2


@pytest.mark.parametrize("features", [np.zeros((2, 2)), np.full((3, 2), np.nan)])
def test_a_file_with_too_few_features_or_no_numbers_does_not_count(features, tmp_path):
    compute, store = Counted(), FeatureStore(tmp_path)
    spelled = json.dumps(PROVENANCE, sort_keys=True)
    np.savez(store.path(PROVENANCE), features=features, provenance=np.array(spelled))
    assert store.get(PROVENANCE, compute)[0, 0] == 1 and compute.calls == 1


def test_a_crash_while_writing_leaves_nothing_that_counts(tmp_path, monkeypatch):
    compute, store = Counted(), FeatureStore(tmp_path)

    def crash(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez", crash)
        store.get(PROVENANCE, compute)
    assert list(tmp_path.iterdir()) == []
    assert store.get(PROVENANCE, compute)[0, 0] == 2


def test_features_not_worth_keeping_and_no_folder(tmp_path):
    for compute, store in ((Counted(keep=False), FeatureStore(tmp_path)), (Counted(), FeatureStore(None))):
        assert store.get(PROVENANCE, compute)[0, 0] == 1 and store.get(PROVENANCE, compute)[0, 0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--features_dir"):
        FeatureStore(tmp_path / "file" / "features").get(PROVENANCE, Counted())


def test_the_default_folder_is_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "tessera" / "features"


def test_a_dataset_prepared_anew_is_another_one(scenes_dir, tmp_path):
    arguments = ("scenes/single32", str(tmp_path), "validation", 10, 32)
    folder = tmp_path / "scenes" / "single32" / "1.0.0"
    folder.mkdir(parents=True)
    info = next((scenes_dir / "scenes" / "single32").glob("*/dataset_info.json")).read_text()
    (folder / "dataset_info.json").write_text(info)
    first = dataset_provenance(*arguments)
    assert first["dataset"] == "scenes/single32/1.0.0" and first["split"] == "validation"
    assert dataset_provenance(*arguments) == first
    (folder / "dataset_info.json").write_text(info.replace("numBytes", "numBites"))
    assert dataset_provenance(*arguments)["contents"] != first["contents"]
