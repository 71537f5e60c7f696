"""Where files are: local paths as ever, and a store of objects, whose faults end in one line."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest

from cli import entry_point, locations
from cli.errors import UserError
from cli.locations import in_store, local, local_copy, locate, locate_from_home, open_upload, upload, write_whole

from ..object_store import ObjectStore

ROOT = Path(__file__).resolve().parents[2]


def raise_(error: Exception):
    raise error


def test_a_local_path_is_a_path_and_its_draft_gets_its_name(tmp_path: Path):
    path = locate(f"{tmp_path}/a.json")
    assert type(path) is type(tmp_path) and not in_store(path)
    before = set(os.listdir(tmp_path))
    write_whole(path, "å\n")
    assert path.read_bytes() == "å\n".encode() and set(os.listdir(tmp_path)) - before == {"a.json"}
    assert local_copy(path) is path


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path):
    os.mkfifo(pipe := tmp_path / "pipe")
    (tmp_path / "page.tmp").write_text("somebody's")
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        write_whole(pipe, "all of it")
        assert read.result(timeout=10) == "all of it"
    assert pipe.is_fifo()
    write_whole(tmp_path / "page.html", "a page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.tmp", "pipe"]
    assert (tmp_path / "page.tmp").read_text() == "somebody's"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://bucket/run", "s3://bucket/run is of a kind that is not read or written here; give a local path, or gs:"),
        ("gs://", "names no place in a bucket; write it as gs://BUCKET/NAME"),
        ("gs:///run", "names no place in a bucket"),
        ("gs://bucket/a/../b", "names no place in a bucket"),
        ("gs:/bucket/run", "gs:/bucket/run has lost a slash; write it as gs://bucket/run"),
    ],
)
def test_other_places_are_refused(place: str, message: str):
    with pytest.raises(UserError, match=message):
        locate(place)


def test_a_home_that_nobody_has_and_a_store_where_only_files_may_be_are_refused():
    with pytest.raises(UserError, match="^~nobody-here/data begins with a home folder that nobody has"):
        locate_from_home("~nobody-here/data")
    with pytest.raises(UserError, match="^--features_dir=gs://b/features must be on this machine"):
        local("gs://b/features", "--features_dir")


def test_an_object_is_written_at_once_and_seen_by_all(object_store: ObjectStore, bucket: str):
    path = locate(f"gs://{bucket}/run/a.json")
    assert in_store(path) and not path.is_file() and list(path.parent.glob("*")) == []
    write_whole(path, "one")
    assert path.read_text() == "one" and path.is_file() and path.parent.is_dir()
    for name in ("b.json", "c.json"):
        object_store.put(f"{bucket}/run/{name}", b"of another machine")
        assert name in [each.name for each in path.parent.iterdir()]
    object_store.forbidden = "POST .*upload_id"
    with pytest.raises(OSError, match="Forbidden"):
        write_whole(path, "two")
    assert path.read_text() == "one"
    assert not any("tmp" in name for name in object_store.names(f"{bucket}/"))


def test_a_folder_in_a_store_is_whole_when_its_marker_is_there(object_store: ObjectStore, bucket: str, tmp_path: Path):
    for name in ("a/1", "b", "info", "z"):
        (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name).write_text(name)
    upload(tmp_path / "made", locate(f"gs://{bucket}/made"), "info")
    written = [
        request.partition("name=")[2].partition("&")[0] for request in object_store.requests if bucket in request
    ]
    assert [name for name in written if name] == ["made/a/1", "made/b", "made/z", "made/info"]
    assert object_store[f"{bucket}/made/a/1"] == b"a/1"


def test_a_copy_is_made_once_and_again_when_the_object_changes(object_store: ObjectStore, bucket: str, monkeypatch):
    path = locate(f"gs://{bucket}/rows.npy")
    write_whole(path, b"first")
    copy = local_copy(path)
    assert type(copy) is type(Path()) and copy.read_bytes() == b"first"
    object_store.requests.clear()
    assert local_copy(path) == copy
    assert not any("alt=media" in request for request in object_store.requests)
    write_whole(path, b"again")  # as long, in the same second
    assert local_copy(path).read_bytes() == b"again" and not copy.exists()
    monkeypatch.setattr(locations, "_describe", lambda location: {"generation": "9", "size": 5, "md5Hash": "another"})
    with pytest.raises(UserError, match="did not arrive whole"):
        local_copy(path)


@pytest.mark.parametrize("size", [9, 6 * 2**20])  # sent in one request, and in several
def test_an_upload_that_an_error_ends_leaves_what_was_there(object_store: ObjectStore, bucket: str, size: int):
    path = locate(f"gs://{bucket}/rows.npy")
    write_whole(path, "whole")
    with pytest.raises(ZeroDivisionError), open_upload(path) as sink:
        sink.write(bytes(size))
        raise_(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError), open_upload(path.with_name("new")) as sink:
        sink.write(bytes(size))
        raise_(ZeroDivisionError())
    del sink
    gc.collect()
    assert object_store[f"{bucket}/rows.npy"] == b"whole" and object_store.names(f"{bucket}/") == ["rows.npy"]
    assert not any(name.startswith(f"{bucket}/") for name, *_ in object_store._uploads.values())


def test_what_a_store_refuses_is_one_line(object_store: ObjectStore, bucket: str, monkeypatch, capsys):
    def end_of(action, code: int = 2) -> str:
        monkeypatch.setattr("sys.argv", ["command"])
        with pytest.raises(SystemExit) as end:
            entry_point.run(lambda arguments: action())
        assert end.value.code == code
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        return line

    with pytest.raises(ZeroDivisionError):
        entry_point.run(lambda arguments: 1 // 0)
    assert "there is no bucket gs://nobodys" in end_of(lambda: locate("gs://nobodys/run"))
    path = locate(f"gs://{bucket}/a")
    object_store.forbidden = "POST"
    refused = end_of(lambda: write_whole(path, "a"))
    assert "the store refused (the account does not have storage.objects.create" in refused
    unreached = aiohttp.ClientError("no route")
    assert "the store cannot be reached" in end_of(lambda: raise_(unreached), code=1)
    object_store.unknown = True
    locations._reach.cache_clear()
    assert "no credentials for gs:// were found" in end_of(lambda: locate(f"gs://{bucket}/a"))


def test_without_the_library_of_a_store_it_is_named():
    program = "import sys; sys.modules['gcsfs'] = None; from cli.locations import locate; locate('gs://bucket/run')"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.stderr.splitlines()[-1].endswith("run `pip install -e '.[gcs]'`")
