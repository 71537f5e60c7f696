"""A source of pictures becomes a dataset: what is kept, what is left out and why, and the same bytes every time."""

import collections
import dataclasses
import io
import json
import os
import pickle
import re
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cli.errors import UserError
from data import folder
from data.folder import preparation
from data.folder.examination import resized
from data.folder.items import Rejected
from data.folder.preparation import decide
from data.pictures import read_picture
from data.preprocess import center_square
from data.records import RecordSource, dataset_folder

from .damaged import FORMS, MIN_SIZE, encode, make, reasons, write_folder
from .files import contents

MADE = make(240, 20)


def prepare(source: str, data_dir: Path, name: str = "made", workers: int = 1, fields=None, **options) -> dict:
    fields = fields or folder.Fields()
    pictures = folder.PictureSettings(**{key: options.pop(key) for key in list(options) if key != "validation"})
    request = folder.Request(name, source, fields, pictures=pictures, **options)
    return folder.prepare(request, folder.list_source(source, fields), data_dir, workers)


def records(data_dir: Path, name: str = "made") -> list[dict]:
    splits = preparation.read_report(data_dir / "folder" / name / "1.0.0")["splits"]
    sources = [RecordSource(f"folder/{name}", split, str(data_dir), pictures=False) for split in splits]
    return [source[index] for source in sources for index in range(len(source))]


@pytest.mark.parametrize("form", FORMS)
def test_every_picture_is_kept_or_named_with_its_reason(form: str, tmp_path: Path):
    source = FORMS[form](MADE, tmp_path / form)
    report = prepare(source, tmp_path / "data", min_size=MIN_SIZE)
    assert report["skipped"] == reasons(MADE)
    whole = {each.name: each for each in MADE if not each.reason}
    assert sum(report["splits"].values()) == len(whole)
    for each in MADE:
        said = [left["reason"] for left in report["left_out"] if each.name in left["name"]]
        assert said == ([each.reason] if each.reason else []), each.name
    stored = records(tmp_path / "data")
    assert len(stored) == len(whole)
    for record in stored:
        made = next(whole.pop(name) for name in list(whole) if name in record["id"].decode())
        assert record["image"] == made.data
        assert record["captions"] == (made.caption.decode(),)


def test_forms_give_the_same_splits(tmp_path: Path):
    """Pixels alone say where a picture belongs: not its name, its neighbors, or how it is kept."""
    splits = {}
    for form, write in FORMS.items():
        prepare(write(MADE, tmp_path / form), tmp_path, form, min_size=MIN_SIZE, validation=0.1)
        source = RecordSource(f"folder/{form}", "validation", str(tmp_path))
        splits[form] = sorted(source[index]["captions"] for index in range(len(source)))
    assert splits["folder"] == splits["tar"] == splits["parquet"]
    assert 10 < len(splits["folder"]) < 35


def test_a_share_for_validation_does_not_move_when_pictures_are_added(tmp_path: Path):
    write_folder(MADE[:120], tmp_path / "some")
    write_folder(MADE, tmp_path / "all")
    found = {}
    for name in ("some", "all"):
        prepare(str(tmp_path / name), tmp_path, name, validation=0.2)
        found[name] = {record["id"] for record in _split(f"folder/{name}", "validation", tmp_path)}
    names = {each.name.encode() for each in MADE[:120]}
    assert found["some"] == found["all"] & names
    assert found["all"] - names


def _split(dataset: str, split: str, data_dir: Path) -> list[dict]:
    source = RecordSource(dataset, split, str(data_dir), pictures=False)
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize(("validation", "expected"), [(7, 7), (1, 1), (0, 0), (1e-9, 1)])
def test_a_number_for_validation_is_exact(validation: float, expected: int, tmp_path: Path):
    report = prepare(write_folder(MADE, tmp_path / "in"), tmp_path, validation=validation)
    assert report["splits"].get("validation", 0) == expected


@pytest.mark.parametrize("validation", [0.9999999999, 5000])
def test_no_training_picture_is_an_error(validation: float, tmp_path: Path):
    source = write_folder(MADE[:8], tmp_path / "in")
    with pytest.raises(UserError, match="is left to train on"):
        prepare(source, tmp_path, validation=validation)


def test_where_no_picture_is_left_the_first_of_each_reason_is_named(tmp_path: Path):
    FORMS["tar"](make(4, 0), tmp_path / "in")
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(b"<html>" * 1000)
    (tmp_path / "in" / "notes.md").write_text("")
    message = r"left to train on: 2 unreadable \(000.tar: .*what follows is lost\); 1 other \(notes.md\); look at"
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / "in"), tmp_path)


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch):
    source = write_folder(MADE, tmp_path / "in")
    monkeypatch.setattr("data.folder.picture_folder.PORTION", 50)
    prepare(source, tmp_path / "one", min_size=MIN_SIZE)
    prepare(source, tmp_path / "two", workers=2, min_size=MIN_SIZE)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list(tmp_path.glob("one/folder/made/1.0.0/*-train.array_record*"))) == 5


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 3, 5, 8, 10])
def test_what_was_finished_before_a_kill_is_not_done_again(after: int, tmp_path: Path, monkeypatch):
    """Ten tasks: five portions are examined, then written; the kill comes after some of them."""
    source = write_folder(MADE, tmp_path / "in")
    monkeypatch.setattr("data.folder.picture_folder.PORTION", 50)
    prepare(source, tmp_path / "once")
    done: list[str] = []
    limit = after
    for task_type in (preparation.ExaminePortion, preparation.WritePortion):

        def call(self, run=task_type.__call__):
            if len(done) == limit:
                raise Killed
            done.append(f"{type(self).__name__} {self.portion.entries[0].name}")
            return run(self)

        monkeypatch.setattr(task_type, "__call__", call)
    with monkeypatch.context() as patch:
        if after == 10:  # all is written but what describes it
            patch.setattr(preparation, "_describe", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(source, tmp_path / "killed")
    assert len(done) == after and not list(tmp_path.glob("killed/folder/made"))
    limit = 1000
    prepare(source, tmp_path / "killed")
    assert len(done) == len(set(done)) == 10
    assert contents(tmp_path / "killed") == contents(tmp_path / "once")


def test_a_second_preparation_changes_nothing_or_says_what_differs(tmp_path: Path):
    source = write_folder(MADE[:20], tmp_path / "in")
    first = prepare(source, tmp_path / "data")
    before = contents(tmp_path / "data")
    assert prepare(source, tmp_path / "data") == prepare(f"{source}/", tmp_path / "data") == first
    with pytest.raises(UserError, match="prepared with another --validation, --text_field, --size; give"):
        prepare(source, tmp_path / "data", validation=3, size=20, fields=folder.Fields(text="x"))
    (tmp_path / "in" / "inspect.html").write_text("a page about it, which is no part of it")
    assert prepare(source, tmp_path / "data") == first
    (tmp_path / "in" / "new.png").write_bytes(encode(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(UserError, match="prepared from .*in with another content"):
        prepare(source, tmp_path / "data")
    assert contents(tmp_path / "data") == before
    prepare(source, tmp_path / "data", "other")
    assert dataset_folder("folder/other", str(tmp_path / "data")).is_dir()


def test_a_source_that_changes_meanwhile_is_found(tmp_path: Path, monkeypatch):
    source = write_folder(MADE[:20], tmp_path / "in")

    def change_then_decide(*arguments):
        (tmp_path / "in" / MADE[3].name).write_bytes(MADE[4].data)
        return decide(*arguments)

    monkeypatch.setattr(preparation, "decide", change_then_decide)
    with pytest.raises(UserError, match="the source changed while it was prepared"):
        prepare(source, tmp_path / "data")
    monkeypatch.undo()
    report = prepare(source, tmp_path / "data")
    assert report["skipped"]["duplicate"] >= 1  # what was examined before the change was not believed


def test_a_change_that_no_time_or_size_tells_is_not_found_for_ever(tmp_path: Path, monkeypatch):
    source = write_folder(MADE[:20], tmp_path / "in")
    path = tmp_path / "in" / MADE[3].name
    before = path.stat()

    def change_then_decide(*arguments):
        path.write_bytes(b"x" * before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return decide(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "decide", change_then_decide)
        with pytest.raises(UserError, match="the source changed while it was prepared"):
            prepare(source, tmp_path / "data")
    assert "corrupt" in prepare(source, tmp_path / "data")["skipped"]


def test_tables_of_one_folder_are_sources_of_their_own(tmp_path: Path, monkeypatch):
    source = write_folder([dataclasses.replace(each, caption=None) for each in MADE[:8]], tmp_path / "in")
    for table in ("a", "b"):
        rows = "".join(f"{each.name},{table} {index}\n" for index, each in enumerate(MADE[:8]))
        (tmp_path / "in" / f"{table}.csv").write_text(f"file_name,text\n{rows}")
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "decide", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(f"{source}/a.csv", tmp_path / "data")
    prepare(f"{source}/b.csv", tmp_path / "data", validation=0)
    assert sorted(record["captions"] for record in records(tmp_path / "data"))[0] == ("b 0",)
    with pytest.raises(UserError, match="prepared from .*b.csv with another content"):
        prepare(f"{source}/a.csv", tmp_path / "data", validation=0)


def test_what_another_process_has_just_finished_is_compared(tmp_path: Path, monkeypatch):
    source = write_folder(MADE[:8], tmp_path / "in")

    def lock(path: Path, timeout: int) -> filelock.BaseFileLock:
        monkeypatch.undo()
        prepare(source, tmp_path / "data", validation=3)
        path.parent.mkdir(exist_ok=True)
        return filelock.FileLock(path, timeout=timeout)

    monkeypatch.setattr(preparation.filelock, "FileLock", lock)
    with pytest.raises(UserError, match="prepared with another --validation"):
        prepare(source, tmp_path / "data")


def test_two_processes_cannot_prepare_the_same(tmp_path: Path, monkeypatch):
    source = write_folder(MADE[:20], tmp_path / "in")

    def decide_after_another(*arguments):
        with pytest.raises(UserError, match="another process prepares folder/made"):
            prepare(source, tmp_path / "data")
        return decide(*arguments)

    monkeypatch.setattr(preparation, "decide", decide_after_another)
    prepare(source, tmp_path / "data")


@pytest.mark.parametrize(
    ("resize", "sizes"),
    [("short", {(24, 12), (12, 24), (12, 12), (10, 30)}), ("long", {(12, 6), (6, 12), (12, 12), (4, 12)})]
    + [("square", {(12, 12), (10, 10)})],
)
@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_pictures_are_made_smaller_once_and_never_larger(resize: str, sizes: set, encoding: str, tmp_path: Path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for index, size in enumerate([(40, 20), (20, 40), (40, 40), (10, 30), (12, 12)]):
        (tmp_path / "in" / f"{index}.png").write_bytes(encode(rng.integers(0, 256, (*size, 3), dtype=np.uint8)))
    report = prepare(str(tmp_path / "in"), tmp_path, size=12, resize=resize, encoding=encoding, validation=0)
    stored = {record["id"].decode(): record["image"] for record in records(tmp_path)}
    assert {read_picture(data).shape[:2] for data in stored.values()} == sizes
    changed = {name for name, data in stored.items() if data != (tmp_path / "in" / name).read_bytes()}
    assert report["encoded_again"] == len(changed)
    assert "4.png" not in changed and ("3.png" in changed) == (resize != "short")
    formats = {Image.open(io.BytesIO(stored[name])).format for name in changed}
    assert formats == {encoding.upper()}


def test_a_picture_that_stands_on_its_side_is_upright_after_resizing(tmp_path: Path):
    (tmp_path / "in").mkdir()
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for name in ("a", "b"):
        Image.fromarray(np.roll(pixels, ord(name), 1)).save(tmp_path / "in" / f"{name}.jpg", exif=exif)
    prepare(str(tmp_path / "in"), tmp_path, size=10, validation=0)
    assert {read_picture(record["image"]).shape for record in records(tmp_path)} == {(20, 10, 3)}


def test_pictures_without_any_caption_are_a_dataset_of_pictures(tmp_path: Path):
    bare = [dataclasses.replace(each, caption=None) for each in MADE if not each.reason]
    report = prepare(write_folder(bare, tmp_path / "in"), tmp_path)
    assert report["captions"] == "none" and report["skipped"] == {}
    source = RecordSource("folder/made", "train", str(tmp_path))
    assert not source.has_captions and not source.class_names
    assert center_square(source[0]["image"], 16).shape == (16, 16, 3)


def test_names_of_sub_folders_are_classes_and_captions(tmp_path: Path):
    for index, name in enumerate(("golden_retriever", "cat", "cat", "owl")):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name / f"{index}.png").write_bytes(MADE[index].data)
    (tmp_path / "in" / "4.png").write_bytes(MADE[4].data)
    report = prepare(str(tmp_path / "in"), tmp_path, validation=0)
    assert report["captions"] == "classes" and report["classes"] == ["cat", "golden_retriever", "owl"]
    assert report["skipped"] == {"no caption": 1}
    assert RecordSource("folder/made", "train", str(tmp_path)).class_names == {"label": tuple(report["classes"])}
    assert {record["id"].decode(): (record["captions"], int(record["label"])) for record in records(tmp_path)} == {
        "cat/1.png": (("cat",), 0),
        "cat/2.png": (("cat",), 0),
        "golden_retriever/0.png": (("golden retriever",), 1),
        "owl/3.png": (("owl",), 2),
    }


def test_numbers_of_classes_are_kept_with_the_names_that_are_known(tmp_path: Path):
    pictures = [each.data for each in MADE[:4]]
    table = pa.table({"image": pictures, "label": [2, 0, None, 4]})
    features = {"info": {"features": {"label": {"names": ["cat", "dog", "owl"]}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet")
    report = prepare(str(tmp_path / "a.parquet"), tmp_path, validation=0)
    assert report["classes"] == ["cat", "dog", "owl", "3", "4"] and report["skipped"] == {"no caption": 1}
    stored = [(record["captions"], int(record["label"])) for record in records(tmp_path)]
    assert stored == [(("owl",), 2), (("cat",), 0), (("4",), 4)]
    pq.write_table(table.append_column("text", [["x"] * 4]), tmp_path / "b.parquet")
    report = prepare(str(tmp_path / "b.parquet"), tmp_path, "b", validation=0)
    assert report["captions"] == "given" and report["classes"] == ["0", "1", "2", "3", "4"]
    assert [int(record["label"]) for record in records(tmp_path, "b")] == [2, 0, -1, 4]


def test_numbers_of_classes_are_no_captions_however_they_are_written(tmp_path: Path):
    source = Path(write_folder([dataclasses.replace(each, caption=None) for each in MADE[:4]], tmp_path / "in"))
    for name, values, classes in (
        ("whole", ("3.0", "-1", "1", ""), ["0", "1", "2", "3"]),
        ("large", ("1234567", "12345678", "5", "5"), ["5", "1234567", "12345678"]),
        ("parts", ("0.5", "-1", "1e-05", "10"), ["1e-05", "0.5", "10"]),
    ):
        rows = "".join(f"{each.name},{value}\n" for each, value in zip(MADE[:4], values, strict=True))
        (source / f"{name}.csv").write_text(f"file_name,label\n{rows}")
        report = prepare(str(source / f"{name}.csv"), tmp_path, name, validation=0)
        assert (report["captions"], report["classes"], report["splits"]) == ("none", classes, {"train": 4})


def test_sub_folders_that_are_numbers_are_classes_and_no_captions(tmp_path: Path):
    for index, number in enumerate((0, 2, 10)):
        (tmp_path / "in" / str(number)).mkdir(parents=True)
        (tmp_path / "in" / str(number) / "1.png").write_bytes(MADE[index].data)
    report = prepare(str(tmp_path / "in"), tmp_path, validation=0)
    assert report["captions"] == "none" and report["classes"] == ["0", "2", "10"]
    found = {record["id"].decode(): int(record["label"]) for record in records(tmp_path)}
    assert found == {"0/1.png": 0, "2/1.png": 1, "10/1.png": 2}


@pytest.mark.parametrize(
    ("known", "labels", "classes"),
    [
        (["1", "2"], [3, 0], ["1", "2", "2 (2)", "3"]),
        (["", "cat", "cat"], [2, 0], ["0", "cat", "cat (2)"]),
        (["\ud800", "a\nb"], [1, 0], ["\ufffd", "a b"]),
    ],
)
def test_names_of_classes_are_distinct_and_can_be_written(known, labels, classes, tmp_path: Path):
    table = pa.table({"image": [each.data for each in MADE[:2]], "label": labels})
    features = {"info": {"features": {"label": {"names": known}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet")
    assert prepare(str(tmp_path / "a.parquet"), tmp_path, validation=0)["classes"] == classes
    assert RecordSource("folder/made", "train", str(tmp_path)).class_names == {"label": tuple(classes)}
    assert [int(record["label"]) for record in records(tmp_path)] == labels


def test_a_side_that_no_jpeg_holds_is_png():
    data = encode(np.zeros((80_000, 10, 3), np.uint8))
    with Image.open(io.BytesIO(resized(data, folder.PictureSettings(size=9)))) as picture:
        assert picture.format == "PNG" and picture.size == (9, 72_000)


def test_a_source_whose_name_is_no_utf8_is_prepared(tmp_path: Path):
    source = write_folder(MADE[:8], tmp_path / os.fsdecode(b"b\xe4r"))
    table = Path(source, os.fsdecode(b"t\xe4.csv"))
    table.write_text(f"file_name,text\n{MADE[0].name},a caption\n")
    report = prepare(str(table), tmp_path, validation=0)
    assert report["notes"][0].encode().startswith("t\ufffd.csv".encode())


def test_a_rejection_comes_back_from_another_process():
    again = pickle.loads(pickle.dumps(Rejected("link", "to nowhere")))
    assert (again.reason, again.detail) == ("link", "to nowhere")


def test_every_reason_is_explained():
    source = "".join(path.read_text() for path in Path(folder.__file__).parent.glob("*.py"))
    used = set(re.findall(r'Rejected\(\s*"([^"]+)"', source)) | {"corrupt", "duplicate", "no caption", "too small"}
    assert used == set(folder.REASONS)


def test_the_report_is_stored_and_counts_what_it_names(tmp_path: Path):
    report = prepare(write_folder(MADE, tmp_path / "in"), tmp_path, min_size=MIN_SIZE)
    stored = json.loads((tmp_path / "folder" / "made" / "1.0.0" / "report.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert collections.Counter(each["reason"] for each in stored["left_out"]) == stored["skipped"]
