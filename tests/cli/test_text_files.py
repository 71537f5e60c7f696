"""Text files as editors save them: marks, encodings, line ends, limits; one reader for every door."""

import os
import re
import threading
from pathlib import Path

import pytest

from cli.errors import UserError
from cli.text_files import read_lines, read_text

LISTS = {
    "a mark": (
        b"\xef\xbb\xbfa small red circle\r\na large blue square\r\n",
        ("a small red circle", "a large blue square"),
    ),
    "no line end": (b"hen", ("hen",)),
    "blank lines and blanks": (b"\n  hen \t\n\r\n \nowl\n\n", ("hen", "owl")),
    "line separator": ("a\u2028b\nc\n".encode(), ("a\u2028b", "c")),
    "paragraph separator": ("a\u2029b\n".encode(), ("a\u2029b",)),
    "next line": ("a\u0085b\n".encode(), ("a\u0085b",)),
    "form feed": (b"a\x0cb\nc\n", ("a\x0cb", "c")),
    "vertical tab": (b"a\x0bb\n", ("a\x0bb",)),
    "information separators": (b"a\x1cb\x1dc\x1ed\n", ("a\x1cb\x1dc\x1ed",)),
    "CR inside a line": (b"a\rb\r\nc", ("a\rb", "c")),
    "two files with marks": (b"\xef\xbb\xbfhen\n\xef\xbb\xbfowl\n", ("hen", "owl")),
    "letters beyond ASCII": ("café\n雞\n🐓\n".encode(), ("café", "雞", "🐓")),
}

REFUSED = {
    "empty": (b"", "is empty"),
    "blank": (b" \r\n\n", "is empty"),
    "a mark alone": (b"\xef\xbb\xbf", "is empty"),
    "a mark and a line end": (b"\xef\xbb\xbf\r\n", "is empty"),
    "UTF-16": ("hen\n".encode("utf-16"), "is not UTF-8 text"),
    "UTF-16 without a mark": ("hen\n".encode("utf-16-le"), "NUL"),
    "UTF-32": ("hen\n".encode("utf-32-be"), "NUL"),
    "cp1252": ("café\n".encode("cp1252"), "byte 3 is 0xe9"),
    "NUL": (b"hen\0\n", "NUL"),
    "large": (b"hen\n" * 512 * 1024, "larger than 1 MiB"),
}


@pytest.mark.parametrize(("data", "entries"), LISTS.values(), ids=LISTS)
def test_only_a_line_feed_ends_an_entry(tmp_path: Path, data: bytes, entries: tuple[str, ...]):
    (tmp_path / "words.txt").write_bytes(data)
    assert read_lines(tmp_path / "words.txt") == entries


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_list_is_refused_in_one_line_that_names_the_file(tmp_path: Path, data: bytes, reason: str):
    path = tmp_path / "words.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"the file of classes {re.escape(str(path))} .*{reason}") as raised:
        read_lines(path, "file of classes", limit=1 << 20)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_read_is_refused(tmp_path: Path):
    for path, reason in ((tmp_path / "no", "no file of"), (tmp_path, "is a folder"), ("a\0b", "cannot read")):
        with pytest.raises(UserError, match=reason):
            read_text(path, "file of prompts")


def test_text_keeps_all_but_mark_and_carriage_returns(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf a \r\n\r\nb\x0c")
    assert read_text(tmp_path / "a") == " a \n\nb\x0c"
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf")
    assert read_text(tmp_path / "b") == ""


def test_a_pipe_is_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"hen\n",))
    writer.start()
    assert read_lines(tmp_path / "pipe") == ("hen",)
    writer.join()
