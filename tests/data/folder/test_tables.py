"""Tables of captions: whose rows belong to which picture, and rows that cannot be read."""

import json
import unicodedata
from pathlib import Path

import pytest

from cli.errors import UserError
from data import folder

from .files import put

NAMES = ("a.png", "sub/b.png", "c.png", "deep/er/d.png")


@pytest.fixture
def root(tmp_path: Path, png: bytes) -> Path:
    for name in NAMES:
        put(tmp_path, name, png)
    return tmp_path


def captions(kept) -> dict[str, tuple[str, ...]]:
    return {name: item.captions for name, item in kept.items() if item.captions}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", 'file_name,caption\na.png,"a cat, asleep"\nsub/b.png,"two\nlines"\nc.png,x\nc.png,y\n'),
        ("captions.csv", '\ufeffimage|caption\r\na.png|a cat, asleep\r\nsub/b.png|"two\nlines"\r\nc.png|x\r\nc.png|y'),
        (
            "metadata.tsv",
            'n\tPath\tText\n1\ta.png\ta cat, asleep\n2\tsub\\b.png\t"two\nlines"\n3\tc.png\tx\n4\tc.png\ty',
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "a cat, asleep"}\n\n{"file_name": "sub/b.png", "text": "two\\nlines"}\n'
            '{"file_name": "c.png", "text": ["x", "y"]}',
        ),
        ("Captions.TSV", 'file_name\tcaption\na.png\ta cat, asleep\nsub/b.png\t"two\nlines"\nc.png\tx\nc.png\ty\n'),
        (
            "METADATA.JSONL",
            '{"file_name": "a.png", "text": "a cat, asleep"}\n{"file_name": "sub/b.png", "text": "two\\nlines"}\n'
            '{"file_name": "c.png", "text": ["x", "y"]}',
        ),
    ],
)
def test_rows_name_pictures_and_their_captions(name: str, text: str, root: Path, read_source):
    put(root, name, text)
    kept, left_out = read_source(root)
    assert captions(kept) == {"a.png": ("a cat, asleep",), "sub/b.png": ("two\nlines",), "c.png": ("x", "y")}
    assert set(kept) == set(NAMES) and not left_out


def test_names_are_looked_up_below_the_table_and_never_opened(root: Path, read_source, tmp_path_factory, png: bytes):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    put(elsewhere, "e.png", png)
    rows = [
        "a.png",
        f"{elsewhere}/e.png",
        "../e.png",
        "sub/../a.png",
        "gone.png",
        "d.png",
        "",
        "\\\\host\\share\\a.png",
    ]
    put(root, "captions.jsonl", "".join(json.dumps({"file": row, "caption": f"of {row}"}) + "\n" for row in rows))
    kept, left_out = read_source(root)
    assert captions(kept) == {"a.png": ("of a.png",), "deep/er/d.png": ("of d.png",)}
    assert left_out == {
        "captions.jsonl, line 2": "outside",
        "captions.jsonl, line 3": "outside",
        "captions.jsonl, line 4": "outside",
        "captions.jsonl, line 5": "missing",
        "captions.jsonl, line 7": "unreadable",
        "captions.jsonl, line 8": "outside",
    }


def test_a_table_in_a_sub_folder_is_of_that_folder(root: Path, read_source):
    put(root, "sub/metadata.csv", "file_name,text\nb.png,inner\na.png,not above\n")
    kept, left_out = read_source(root)
    assert captions(kept) == {"sub/b.png": ("inner",)}
    assert left_out == {"sub/metadata.csv, line 3": "missing"}


def test_rows_that_cannot_be_read_cost_themselves_alone(root: Path, read_source):
    lines = [
        b"file_name,caption",
        b"a.png,good",
        b"c.png,a dog, running",  # an unquoted comma
        b"c.png," + b"x" * 3_000_000,  # a gigantic line
        b"c.png,\xff\xfe",
        b'c.png,"never' + b" closed" * 10,
        *[b"x" * 600_000] * 2,  # which make a field that is too long
        b"sub/b.png," + b"long" * 50_000,
    ]
    put(root, "captions.csv", b"\n".join(lines) + b"\n")
    kept, left_out = read_source(root)
    assert captions(kept) == {"a.png": ("good",), "sub/b.png": ("long" * 50_000,)}
    assert left_out == {f"captions.csv, line {line}": "unreadable" for line in (3, 4, 5, 6)}


def test_lines_of_json_that_cannot_be_read_cost_themselves_alone(root: Path, read_source):
    lines = [
        b'{"file_name": "a.png", "text": "good"}',
        b"[1, 2]",
        b"{" * 50_000,
        b'{"file_name": "c.png", "text": "' + b"x" * 3_000_000 + b'"}',
        b'{"file_name": "c.png", "text": "\\ud800"}',
        b'{"file_name": 7, "text": "number"}',
        b'{"file_name": "c.png", "text": "\xff"}',
        b'{"file_name": "c.png", "text": ' + b"[" * 600 + b"]" * 600 + b"}",
        b'{"file_name": "c.png", "text": "x", "label": "\\ud800"}',
        b'{"file_name": "sub/b.png", "text": "also good"}',
    ]
    put(root, "metadata.jsonl", b"\n".join(lines))
    kept, left_out = read_source(root)
    assert captions(kept) == {"a.png": ("good",), "sub/b.png": ("also good",)}
    assert left_out == {f"metadata.jsonl, line {line}": "unreadable" for line in range(2, 10)}


def test_fields_that_later_lines_of_json_have_are_found(root: Path, read_source):
    rows = [
        {"about\n": "these pictures"},
        {"file_name": "a.png"},
        {"file_name": "c.png", "label": "cat"},
        {"file_name": "sub/b.png", "text": "late", "label": "dog"},
        {"file_name": "\ud800.png", "text": "of no picture"},
    ]
    put(root, "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    kept, left_out = read_source(root)
    assert captions(kept) == {"sub/b.png": ("late",)}
    assert [kept[name].label for name in NAMES] == [None, "dog", "cat", None]
    assert left_out == {"metadata.jsonl, line 1": "unreadable", "metadata.jsonl, line 5": "missing"}
    with pytest.raises(UserError, match="no field 'long'; choose --text_field of about\ufffd, file_name, label, text"):
        read_source(root, text="long")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("captions.csv", "n\xe4me,text\na.png,x\nb.png,y\n".encode("latin-1"), "first line .* not UTF-8"),
        ("captions.csv", "file_name,text\na.png,x\n".encode("utf-16"), "first line .* save it as UTF-8"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n'.encode("utf-16"), "no row .* save it as UTF-8"),
        ("captions.csv", b"", "captions.csv has no rows; fill it"),
        ("captions.csv", b"\xef\xbb\xbf", "captions.csv has no rows"),
        ("captions.csv", b"file_name,text\n\n", "captions.csv has no rows"),
        ("metadata.jsonl", b" \n\n", "metadata.jsonl has no rows"),
    ],
)
def test_a_table_that_cannot_be_read_at_all_is_an_error(name: str, data: bytes, message: str, root: Path, read_source):
    (root / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_source(root)


def test_fields_are_guessed_and_may_be_named(root: Path, read_source):
    put(root, "table.csv", "id,where,long,short,kind\n1,a.png,a long text,short,cat\n2,c.png,another,tiny,dog\n")
    fields = {"image": "where", "text": "short", "label": "kind"}
    kept, _ = read_source(root / "table.csv", **fields)
    assert captions(kept) == {"a.png": ("short",), "c.png": ("tiny",)}
    assert [kept[name].label for name in NAMES] == ["cat", None, "dog", None]
    with pytest.raises(UserError, match="'id', 'where', 'long', 'short', 'kind'; name by --image_field"):
        read_source(root / "table.csv")
    with pytest.raises(UserError, match="no field 'nothing'; choose --text_field of id, where"):
        read_source(root / "table.csv", image="where", text="nothing")


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (3, 3),
        (3.0, 3),
        (-1, None),
        (-1.0, None),
        (-12345678, None),
        (2**20 - 1, 2**20 - 1),
        (2**20, "1048576"),
        (9_999_999, "9999999"),
        (1234567.0, "1234567"),
        (0.5, "0.5"),
    ],
)
def test_a_class_is_the_same_however_its_number_is_written(value: float, label, root: Path, read_source):
    put(root, "metadata.jsonl", json.dumps({"file_name": "a.png", "label": value}))
    put(root, "captions.csv", f"file_name,label\nc.png,{value}\n")
    kept, left_out = read_source(root)
    assert (kept["a.png"].label, kept["c.png"].label) == (label, label) and not left_out


@pytest.mark.parametrize(("value", "what"), [("1", "classes"), ("-1", "no classes"), ('["cat", "dog"]', "no classes")])
def test_a_field_without_any_class_is_said(value: str, what: str, root: Path):
    put(root, "metadata.jsonl", f'{{"file_name": "a.png", "label": {value}}}')
    notes = folder.list_source(str(root), folder.Fields()).notes
    assert notes[0] == f"metadata.jsonl: pictures of field 'file_name', {what} of field 'label'"


def test_a_class_that_pandas_writes_as_missing_is_none(root: Path, read_source):
    put(root, "metadata.jsonl", '{"file_name": "a.png", "label": NaN}\n{"file_name": "c.png", "label": 2.0}')
    kept, left_out = read_source(root)
    assert (kept["a.png"].label, kept["c.png"].label) == (None, 2) and not left_out


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_accents_of_names_may_be_written_apart(written: str, root: Path, read_source, png: bytes):
    other = {"NFC": "NFD", "NFD": "NFC"}[written]
    for name in ("café.png", "deep/ä.png"):
        put(root, unicodedata.normalize(other, name), png)
    row = unicodedata.normalize(written, "café.png,coffee\nä.png,a letter\n")
    put(root, "captions.csv", f"file_name,text\n{row}")
    kept, left_out = read_source(root)
    found = {unicodedata.normalize("NFC", name): texts for name, texts in captions(kept).items()}
    assert found == {"café.png": ("coffee",), "deep/ä.png": ("a letter",)} and not left_out


@pytest.mark.parametrize(
    ("header", "message"), [("file_name,text,text", "fields, each once"), ('file_name,"te"xt', "must name its fields")]
)
def test_a_header_that_names_no_fields_is_an_error(header: str, message: str, root: Path, read_source):
    put(root, "captions.csv", f"{header}\na.png,x,y\n")
    with pytest.raises(UserError, match=message):
        read_source(root)
