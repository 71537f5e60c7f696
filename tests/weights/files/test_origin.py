"""Files of a folder, of one file, and of a hub repository in its local cache; no test reaches the network."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import DryRunFileInfo, constants

from cli.errors import UserError
from weights.files.origin import (
    Folder,
    HubRepository,
    Leniency,
    Subfolder,
    WeightsFile,
    open_origin,
    read_json,
    read_weights,
)
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
    with pytest.raises(UserError, match=f"hf:tiny/clip@{COMMIT} has none of a.json, b.json"):
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
    said = "tokenizer.json of hf:tiny/clip is not in the cache .* hub cannot be reached; .*, set HF_HUB_OFFLINE=1 to"
    with pytest.raises(UserError, match=said):
        open_origin("hf:tiny/clip").find("tokenizer.json")
    fail(monkeypatch, huggingface_hub.errors.EntryNotFoundError("404"))
    assert open_origin("hf:tiny/clip").find("tokenizer.json") is None
    for error in (OSError("502 Bad Gateway\nfor url"), RuntimeError("502 Bad Gateway for url")):
        fail(monkeypatch, error)
        with pytest.raises(UserError, match="cannot fetch tokenizer.json of hf:tiny/clip: 502 Bad Gateway for url$"):
            open_origin("hf:tiny/clip").find("tokenizer.json")


@contextlib.contextmanager
def serving(files, monkeypatch):
    """A hub of these files of "tiny/clip" on this machine, as its own library asks one: what HEAD and GET answer."""
    got = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            prefix, _, name = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = name.partition("/")
            there = prefix == "tiny/clip" and revision in ("main", COMMIT) and name in files
            self.send_response(200 if there else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            if there:
                self.send_header("ETag", f'"{hashlib.sha1(files[name]).hexdigest()}"')
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(files[name]) if there else 0))
            self.end_headers()
            return files[name] if there else b""

        def do_GET(self):
            got.append(self.path.rpartition("/")[2])
            self.wfile.write(self.do_HEAD())

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    try:
        yield got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_what_is_fetched_is_said_with_its_size_before_and_is_there_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    files = {"config.json": b"{}", "unet/model.bin": bytes(12345)}
    with serving(files, monkeypatch) as got:
        said, download = [], huggingface_hub.hf_hub_download

        def listening(*arguments, **keywords):
            if not keywords.get("dry_run"):
                said.append((capsys.readouterr().out, list(got)))
            return download(*arguments, **keywords)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", listening)
        origin = open_origin("hf:tiny/clip")
        assert origin.find("none.json", "config.json").read_bytes() == b"{}"
        assert origin.find("unet/model.bin").read_bytes() == files["unet/model.bin"]
        assert said == [
            (f"hf:tiny/clip@{COMMIT}: fetching config.json, 2 bytes\n", []),
            (f"hf:tiny/clip@{COMMIT}: fetching unet/model.bin, 12.35 kB\n", ["config.json"]),
        ]
        again = open_origin("hf:tiny/clip")
        assert again.find("config.json") and again.find("unet/model.bin") and got == ["config.json", "model.bin"]
    offline = open_origin("hf:tiny/clip")
    assert offline.find("none.json", "config.json") and offline.find("unet/model.bin").read_bytes()
    assert "fetching" not in capsys.readouterr().out and offline.describe() == f"hf:tiny/clip@{COMMIT}"


def test_files_that_belong_together_are_said_with_their_size_before_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    files = {"unet/model.safetensors": bytes(12000), "vae/model.bin": bytes(345), "a/1.safetensors": b"", "a/2": b"1"}
    with serving(files, monkeypatch) as got:
        origin = open_origin("hf:tiny/clip")
        names = [f"model.{end}" for end in ("safetensors", "bin")]
        origin.foretell(*([f"{folder}/{name}" for name in names] for folder in ("unet", "vae", "text_encoder")))
        assert capsys.readouterr().out == f"hf:tiny/clip@{COMMIT}: 2 files to fetch, 12.35 kB\n" and not got
        assert origin.find("unet/model.safetensors")
        capsys.readouterr()
        origin.foretell(["unet/model.safetensors"], ["vae/model.bin"])  # one is there by now
        Subfolder(origin, "a").foretell(["1.safetensors"], ["2"])
        assert capsys.readouterr().out == f"hf:tiny/clip@{COMMIT}: 2 files to fetch, 1 byte\n"
    open_origin("hf:tiny/clip").foretell(["unet/none"], ["vae/model.bin"])
    assert not capsys.readouterr().out


def test_all_files_are_of_the_first_one_s_commit(cached, monkeypatch):
    asked = []

    def download(repository, name, revision, dry_run=False):
        asked.append((repository, name, revision))
        path = str(cached / "config.json")
        return DryRunFileInfo(COMMIT, 2, name, path, True, False) if dry_run else path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    origin = HubRepository("tiny/clip", "v1")
    origin.find("config.json")
    origin.find("model.safetensors")
    assert (
        asked[::2]
        == asked[1::2]
        == [
            ("tiny/clip", "config.json", "v1"),
            ("tiny/clip", "model.safetensors", COMMIT),
        ]
    )


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


def sharded(folder, weight_map) -> Folder:
    """Two files, of which the second has a stale copy of what the index assigns to the first."""
    one = np.full(1, 1, np.float32)
    write_tensors(folder / "1.safetensors", {"a": one})
    write_tensors(folder / "2.safetensors", {"b": 2 * one, "a": 7 * one})
    (folder / "w.index.json").write_text(json.dumps({} if weight_map is ... else {"weight_map": weight_map}))
    return Folder(folder)


def test_each_tensor_is_read_from_the_file_that_the_index_assigns(tmp_path, capsys):
    for first, second, a in (("1", "2", 1), ("2", "2", 7)):
        origin = sharded(tmp_path, {"a": f"{first}.safetensors", "b": f"{second}.safetensors"})
        read = read_weights(origin, ("w.index.json",))
        assert {name: array.tolist() for name, array in read.items()} == {"a": [a], "b": [2]}
    assert read_weights(sharded(tmp_path, {"b": "2.safetensors"}), ("w.index.json",)).keys() == {"b"}
    assert "does not name a, which its files hold and which are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (..., "has no weight_map; it must be an object"),
        (None, "has no weight_map; it must be an object"),
        ([], "has a weight_map that is a list"),
        ("a", "has a weight_map that is a string"),
        ({}, "has a weight_map that is an empty object"),
        ({"a": None, "b": "2.safetensors"}, "says of a that its file is null, not a file's name"),
        ({"a": 5}, "says of a that its file is a number"),
        ({"a": ["1.safetensors"]}, "says of a that its file is a list"),
        ({"a": "../1.safetensors"}, "names the file '../1.safetensors'; an index names files of its own folder"),
        ({"a": "/1.safetensors"}, "an index names files of its own folder"),
        ({"a": ".."}, "an index names files of its own folder"),
        ({"a": "x\\1.safetensors"}, "an index names files of its own folder"),
        ({"a": ""}, "an index names files of its own folder"),
        ({"a": "3.safetensors"}, "has no 3.safetensors"),
        ({"a": f"{'3' * 300}.safetensors"}, "has no 333"),
        ({"a": "link.safetensors"}, "is a link out of its folder"),
        ({"b": "1.safetensors"}, "says that b is in 1.safetensors, which has no such tensor"),
    ],
)
def test_an_index_that_is_none_is_a_line_that_names_it(weight_map, message, tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    write_tensors(tmp_path / "1.safetensors", {"a": np.zeros(1, np.float32)})
    (folder / "link.safetensors").symlink_to("../1.safetensors")
    with pytest.raises(UserError) as error:
        read_weights(sharded(folder, weight_map), ("w.index.json",))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "w.index.json" in str(error.value) or "3.safetensors" in str(error.value)


def test_the_hub_s_own_links_are_followed(cached):
    """A snapshot is links to blobs, also where its folder is given as one."""
    blobs = cached.parents[1] / "blobs"
    write_tensors(blobs / "w.safetensors", {"a": np.ones(1, np.float32)})
    (cached / "1.safetensors").symlink_to("../../blobs/w.safetensors")
    (cached / "w.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert read_weights(Folder(cached), ("w.index.json",))["a"] == 1
    assert read_weights(open_origin("hf:tiny/clip"), ("w.index.json",))["a"] == 1


def test_names_lose_what_training_wrapped_them_in(tmp_path):
    for wrapper in ("module.", "_orig_mod.", "model.", "ema.", "module._orig_mod."):
        write_tensors(tmp_path / "w.safetensors", {f"{wrapper}{name}": np.ones(1) for name in ("a.b", "model.c")})
        assert read_weights(WeightsFile(tmp_path / "w.safetensors"), ()).keys() == {"a.b", "model.c"}
    write_tensors(tmp_path / "w.safetensors", {"module.a": np.ones(1), "b": np.ones(1)})  # not all of them
    assert read_weights(WeightsFile(tmp_path / "w.safetensors"), ()).keys() == {"module.a", "b"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_by_its_tensor_s_name(bad, tmp_path, capsys):
    tensors = {"count": np.ones(2, np.int64), "mask": np.full(2, bad), "visual.proj": np.array([1, bad, bad])}
    write_tensors(tmp_path / "w.safetensors", {**tensors, "z": np.full(1, bad)})
    with pytest.raises(UserError, match="w.safetensors: visual.proj has 2 of 3 values .* --allow_nonfinite to go on"):
        read_weights(WeightsFile(tmp_path / "w.safetensors"), (), ignored="mask")
    lenient = WeightsFile(tmp_path / "w.safetensors", Leniency(nonfinite=True))
    assert read_weights(lenient, (), ignored="mask").keys() == {"count", "visual.proj", "z"}
    assert "warning: " in capsys.readouterr().out


def test_json_that_says_a_key_twice_and_keys_that_a_user_lets_pass(tmp_path):
    (tmp_path / "c.json").write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(UserError, match="the key 'b' is there twice"):
        read_json(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"a": {"b": 1, "c": 2}, "b": 3}')
    assert Folder(tmp_path, Leniency(frozenset({"b"}))).json("c.json") == {"a": {"c": 2}}
