"""Files of a folder, of one file, and of a hub repository in its local cache; no test reaches the network."""

import json

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from cli.errors import UserError
from weights.files.origin import Folder, HubRepository, WeightsFile, open_origin, read_json, read_weights
from weights.files.tensors import write_tensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The snapshot folder of "tiny/clip" in a cache laid out as the hub's, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--tiny--clip"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for ref in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_a_hub_s_files_are_found_in_its_cache(cached, revision):
    origin = open_origin(f"hf:tiny/clip{revision}")
    assert origin.find("none.json", "config.json") == cached / "config.json"
    assert origin.describe() == f"hf:tiny/clip@{COMMIT}"
    assert origin.find("none.json") is None
    with pytest.raises(UserError, match=f"hf:tiny/clip@{COMMIT} has no one of a.json, b.json"):
        origin.require("a.json", "b.json")


def fail(monkeypatch, error):
    def download(*arguments, **keywords):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_an_unknown_repository_or_revision_is_missing_offline(cached):
    with pytest.raises(
        UserError, match="hf:tiny/other has no config.json in the hub's cache, and HF_HUB_OFFLINE is set"
    ):
        open_origin("hf:tiny/other").require("config.json")
    with pytest.raises(UserError, match="hf:tiny/clip@v9 has no config.json"):
        open_origin("hf:tiny/clip@v9").require("config.json")
    with pytest.raises(UserError, match="there is no repository 'a/b/c'"):
        open_origin("hf:a/b/c").require("config.json")


def test_a_network_that_is_down_is_told_from_a_missing_file(cached, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fail(monkeypatch, huggingface_hub.errors.LocalEntryNotFoundError("no connection"))
    with pytest.raises(UserError, match="hf:tiny/clip cannot be reached and tokenizer.json is not in the cache"):
        open_origin("hf:tiny/clip").find("tokenizer.json")
    fail(monkeypatch, huggingface_hub.errors.EntryNotFoundError("404"))
    assert open_origin("hf:tiny/clip").find("tokenizer.json") is None
    fail(monkeypatch, OSError("502 Bad Gateway\nfor url"))
    with pytest.raises(UserError, match="cannot fetch tokenizer.json of hf:tiny/clip: 502 Bad Gateway$"):
        open_origin("hf:tiny/clip").find("tokenizer.json")


def test_all_files_are_of_the_first_one_s_commit(cached, monkeypatch):
    asked = []

    def download(repository, name, revision):
        asked.append((repository, name, revision))
        return str(cached / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    origin = HubRepository("tiny/clip", "v1")
    origin.find("config.json")
    origin.find("model.safetensors")
    assert asked == [("tiny/clip", "config.json", "v1"), ("tiny/clip", "model.safetensors", COMMIT)]


def test_tensors_that_are_spread_over_files_are_read_together(tmp_path):
    write_tensors(tmp_path / "model-1.safetensors", {"a": np.ones(2, np.float32)})
    write_tensors(tmp_path / "model-2.safetensors", {"b": np.zeros(3, np.float32)})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    names = ("model.safetensors", "model.safetensors.index.json")
    assert set(read_weights(Folder(tmp_path), names)) == {"a", "b"}
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="has no model-2.safetensors"):
        read_weights(Folder(tmp_path), names)


def test_a_file_is_itself_and_nothing_beside_it(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"a": np.ones(2, np.float32)})
    (tmp_path / "config.json").write_text("[]")
    origin = open_origin(str(tmp_path / "w.safetensors"))
    assert isinstance(origin, WeightsFile) and origin.find("config.json") is None
    assert set(read_weights(origin, ("model.safetensors",))) == {"a"}
    with pytest.raises(UserError, match="is not a JSON object"):
        read_json(open_origin(str(tmp_path)).require("config.json"))
    with pytest.raises(UserError, match="there is no folder or file .*none; give one, or hf:"):
        open_origin(str(tmp_path / "none"))
