"""Parquet files: columns of pictures, captions and classes, and files that are damaged or lie."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.errors import UserError
from data import folder


def write(path: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_structs_bytes_lists_and_classes(tmp_path: Path, png: bytes, read_source):
    pictures = [{"bytes": png, "path": "one.png"}, {"bytes": png, "path": None}, {"bytes": None, "path": "x.png"}, None]
    table = pa.table({"image": pictures, "texts": [["a", " b "], [], ["c"], None], "label": [1, 0, 2, None]})
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet")
    kept, left_out = read_source(tmp_path)
    assert {name: (item.captions, item.label) for name, item in kept.items()} == {
        "a.parquet, row 0 (one.png)": (("a", "b"), 1),
        "a.parquet, row 1": ((), 0),
    }
    assert left_out == {"a.parquet, row 2 (x.png)": "missing", "a.parquet, row 3": "missing"}
    assert kept["a.parquet, row 1"].data == png


def test_dictionaries_and_views_are_read_as_what_they_hold(tmp_path: Path, png: bytes, read_source):
    columns = {
        "image": pa.array([png, png]).dictionary_encode(),
        "text": pa.array(["x", None]).dictionary_encode(),  # as pandas writes categories
        "about": pa.array(["y", "z"], pa.string_view()),
        "label": pa.array(["cat", "dog"]).dictionary_encode(),
    }
    path = write(tmp_path / "a.parquet", columns)
    for field, (first, second) in {"": (("x",), ()), "about": (("y",), ("z",))}.items():
        items = [(item.data, item.captions, item.label) for item in read_source(path, text=field)[0].values()]
        assert items == [(png, first, "cat"), (png, second, "dog")]


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (pa.array([3.0, None, float("nan"), 0.5]), [3, None, None, "0.5"]),
        (pa.array([-1, 2**20, 2**63 - 1, 0]), [None, "1048576", "9223372036854775807", 0]),
        (pa.array(["-1", "3", "3.0", ""]), [None, 3, 3, None]),
        (pa.array([True, False, None, True]), ["true", "false", None, "true"]),
        (pa.array([["cat"], ["dog", "cat"], [], None]), [None] * 4),  # lists name no class
    ],
)
def test_columns_of_classes(column: pa.Array, labels: list, tmp_path: Path, png: bytes, read_source):
    path = write(tmp_path / "a.parquet", {"image": [png] * 4, "label": column})
    kept, left_out = read_source(path)
    assert [item.label for item in kept.values()] == labels and not left_out
    notes = folder.list_source(str(path), folder.Fields()).notes
    assert ("label" in notes[0]) == any(label is not None for label in labels)


def test_columns_of_odd_kinds_are_one_line_or_ignored(tmp_path: Path, png: bytes, read_source):
    write(tmp_path / "a.parquet", {"image": [{"bytes": 1}], "text": ["x"]})
    with pytest.raises(UserError, match="no column that is known to hold pictures"):
        read_source(tmp_path)
    write(tmp_path / "a.parquet", {"image": [{"bytes": png, "path": 1}], "text": ["x"]})
    assert list(read_source(tmp_path)[0]) == ["a.parquet, row 0"]
    twice = pa.table([pa.array([png]), pa.array(["x"]), pa.array(["y"])], ["image", "text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns 'text'"):
        read_source(tmp_path)


def test_columns_are_guessed_and_may_be_named(tmp_path: Path, png: bytes, read_source):
    columns = {"thumb": [png], "full": [png + b"\0"], "about": ["x"], "n": [3], "url": ["http"]}
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=r"name it by --image_field: thumb \(binary\), full \(binary\), about"):
        read_source(path)
    kept, _ = read_source(path, image="full", text="about", label="n")
    item = kept["a.parquet, row 0"]
    assert (item.data, item.captions, item.label) == (png + b"\0", ("x",), 3)
    with pytest.raises(UserError, match="no field 'n'; choose --text_field of about, url"):
        read_source(path, image="full", text="n")


def test_rows_keep_their_numbers_over_row_groups(tmp_path: Path, png: bytes, read_source, monkeypatch):
    monkeypatch.setattr("data.folder.parquet_files.PORTION", 5)
    columns = {"image": [png] * 13, "text": [str(row) for row in range(13)]}
    kept, _ = read_source(write(tmp_path / "a.parquet", columns, row_group_size=2))
    assert [(name, item.captions) for name, item in kept.items()] == [
        (f"a.parquet, row {row}", (str(row),)) for row in range(13)
    ]


def test_a_damaged_page_costs_what_follows_in_its_portion(tmp_path: Path, png: bytes, read_source, monkeypatch):
    monkeypatch.setattr("data.folder.parquet_files.PORTION", 3)
    columns = {"image": [png + bytes([row]) * 400 for row in range(9)], "text": ["x"] * 9}
    path = write(tmp_path / "a.parquet", columns, row_group_size=3, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    kept, left_out = read_source(path)
    assert list(kept) == [f"a.parquet, row {row}" for row in (0, 1, 2, 6, 7, 8)]
    assert left_out == {"a.parquet, row 3": "unreadable"}


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "footer"])
def test_a_file_that_is_no_parquet_is_one_line(damage: str, tmp_path: Path, png: bytes, read_source):
    path = write(tmp_path / "a.parquet", {"image": [png], "text": ["x"]})
    data = path.read_bytes()
    damaged = {
        "cut": data[:-20],
        "noise": b"PAR1" + bytes(range(256)) * 9 + b"PAR1",
        "empty": b"",
        "footer": data[:-8] + b"\xff\xff\xff\x7f" + data[-4:],  # a footer of 2 GiB
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match="a.parquet cannot be read as parquet"):
        read_source(path)


@pytest.mark.parametrize("store_schema", [False, True])
def test_a_value_that_a_dictionary_repeats_is_measured_before_it_is_copied(store_schema, tmp_path: Path, monkeypatch):
    """32 MiB that a file of some kilobytes holds once and names 5,000 times: 160 GB for who takes it whole."""
    monkeypatch.setattr("data.folder.parquet_files.MAX_PICTURE", 2**25 - 1)
    large = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array([bytes(2**25)]))
    path = tmp_path / "a.parquet"
    table = pa.table({"image": large, "text": ["x"] * 5000})
    pq.write_table(table, path, compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 2**20
    del large, table
    listing = folder.list_source(str(path), folder.Fields())
    before = pa.default_memory_pool().max_memory()
    items = listing.portions[0].read()
    assert {next(items).rejected.reason for _ in range(4)} == {"too large"}
    assert pa.default_memory_pool().max_memory() - before < 2**28
