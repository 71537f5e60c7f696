"""Folders: captions beside pictures, tables, classes, and everything that is no plain file."""

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from cli.errors import UserError
from data import folder
from data.pictures import FORMATS, read_picture

from .files import put

NESTED = '{"text": ' + "[" * 600 + "]" * 600 + "}"  # which JSON's reader takes


def test_text_beside_a_picture_is_its_caption_a_line_each(tmp_path: Path, png: bytes, read_source):
    put(tmp_path, "a/one.JPG", png)
    put(tmp_path, "a/one.txt", "\ufeffa cat\r\n\r\n  two cats \na line\u2028that goes on\x85 here\n")
    put(tmp_path, "two.png", png)
    put(tmp_path, "two.json", '{"caption": "from a json", "width": 3}')
    put(tmp_path, "three.png", png)
    kept, left_out = read_source(tmp_path)
    assert kept["a/one.JPG"].captions == ("a cat", "two cats", "a line\u2028that goes on\x85 here")
    assert kept["two.png"].captions == ("from a json",)
    assert kept["three.png"].captions == ()
    assert kept["two.png"].data == png and not left_out


def test_marks_inside_text_that_was_joined_are_no_part_of_captions(tmp_path: Path, png: bytes, read_source):
    put(tmp_path, "a.png", png)
    put(tmp_path, "a.txt", "x\n\ufeffhello\n \ufeff \n")
    assert read_source(tmp_path)[0]["a.png"].captions == ("x", "hello")


@pytest.mark.parametrize(("picture", "text"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_names_may_be_written_apart(picture: str, text: str, tmp_path: Path, png: bytes, read_source):
    put(tmp_path, unicodedata.normalize(picture, "café.png"), png)
    put(tmp_path, unicodedata.normalize(text, "café.TXT"), "coffee")
    kept, left_out = read_source(tmp_path)
    assert [item.captions for item in kept.values()] == [("coffee",)] and not left_out
    put(tmp_path, unicodedata.normalize(text, "café.png"), png)  # whose caption it is, then
    kept, _ = read_source(tmp_path)
    assert {name: item.captions for name, item in kept.items()} == {
        unicodedata.normalize(text, "café.png"): ("coffee",),
        unicodedata.normalize(picture, "café.png"): (),
    }


def test_every_suffix_of_what_the_decoder_reads_is_a_picture(tmp_path: Path, read_source):
    """As Pillow lists them, and the contents of each as Pillow writes it."""
    Image.init()
    formats = {suffix: kind for suffix, kind in Image.EXTENSION.items() if kind in {*FORMATS, "MPO", "DIB"}}
    suffixes = set(formats) - {".pfm"}  # floats
    for suffix in suffixes:
        put(tmp_path, f"a{suffix}", b"")
    kept, left_out = read_source(tmp_path)
    assert set(kept) == {f"a{suffix}" for suffix in suffixes} and not left_out
    pixels = Image.new("RGB", (4, 4), "red")
    for suffix in ("pnm", "j2k", "jpx", "mpo", "apng"):
        pixels.save(tmp_path / f"b.{suffix}")
        assert read_picture((tmp_path / f"b.{suffix}").read_bytes()).shape == (4, 4, 3)


def test_suffixes_of_captions_are_read_in_any_case(tmp_path: Path, png: bytes, read_source):
    for name in ("A.PNG", "b.png"):
        put(tmp_path, name, png)
    for name, text in {"A.TXT": "large", "b.TXT": "not this", "b.txt": "small"}.items():
        put(tmp_path, name, text)
    kept, left_out = read_source(tmp_path)
    assert {name: item.captions for name, item in kept.items()} == {"A.PNG": ("large",), "b.png": ("small",)}
    assert left_out == {"b.TXT": "other"}


def test_text_yields_to_a_field_only_where_both_stand(tmp_path: Path, png: bytes, read_source):
    for name in ("a.png", "b.png"):
        put(tmp_path, name, png)
        put(tmp_path, name.replace("png", "txt"), "of text")
    put(tmp_path, "b.json", '{"long": "of json"}')
    kept, _ = read_source(tmp_path, text="long")
    assert {name: item.captions for name, item in kept.items()} == {"a.png": ("of text",), "b.png": ("of json",)}


def test_a_class_of_a_table_stays_where_a_file_has_the_caption(tmp_path: Path, png: bytes, read_source):
    put(tmp_path, "a.png", png)
    put(tmp_path, "a.txt", "a caption")
    put(tmp_path, "metadata.csv", "file_name,label\na.png,cat\n")
    kept, _ = read_source(tmp_path)
    assert (kept["a.png"].captions, kept["a.png"].label) == (("a caption",), "cat")


def test_text_that_is_no_caption_is_named(tmp_path: Path, png: bytes, read_source):
    for name, data in {
        "latin": "Bär".encode("latin-1"),
        "utf16": "a cat".encode("utf-16"),
        "huge": b"x" * (2**20 + 1),
    }.items():
        put(tmp_path, f"{name}.png", png)
        put(tmp_path, f"{name}.txt", data)
    for name, data in {
        "list": "[1]",
        "broken": "{",
        "deep": "[" * 100_000,
        "nested": NESTED,
        "half": '{"text": "\\ud800"}',
    }.items():
        put(tmp_path, f"{name}.png", png)
        put(tmp_path, f"{name}.json", data)
    put(tmp_path, "alone.txt", "no picture")
    put(tmp_path, "readme.md", "notes")
    kept, left_out = read_source(tmp_path)
    assert not kept
    bad = dict.fromkeys(
        (f"{n}.png" for n in ("latin", "utf16", "huge", "list", "broken", "deep", "nested", "half")), "bad caption"
    )
    assert left_out == {**bad, "alone.txt": "other", "readme.md": "other"}


def test_a_sidecar_of_a_gigabyte_is_not_read(tmp_path: Path, png: bytes, read_source):
    put(tmp_path, "a.png", png)
    for name in ("a.txt", "b.png"):
        put(tmp_path, name)
        os.truncate(tmp_path / name, 2**30)  # without taking room on the disk
    kept, left_out = read_source(tmp_path)
    assert not kept and left_out == {"a.png": "bad caption", "b.png": "too large"}


def test_nothing_but_plain_files_inside_the_folder_is_read(tmp_path: Path, png: bytes, read_source):
    root = tmp_path / "in"
    put(root, "real/a.png", png)
    put(root, "real/a.txt", "a caption")
    put(tmp_path, "out/b.png", png)
    (root / "inside.png").symlink_to("real/a.png")
    (root / "outside.png").symlink_to("../out/b.png")
    (root / "absolute.txt").symlink_to("/etc/passwd")
    (root / "nowhere.png").symlink_to("missing.png")
    (root / "loop").symlink_to(".")
    (root / "self.png").symlink_to("self.png")
    (root / "away").symlink_to("../out")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "real" / "pipe.txt")
    put(root, ".hidden/c.png", png)
    put(root, "__MACOSX/._a.png", png)
    kept, left_out = read_source(root)
    assert set(kept) == {"real/a.png", "inside.png"}
    links = dict.fromkeys(("outside.png", "absolute.txt", "nowhere.png", "loop", "self.png", "away"), "link")
    special = {"pipe.png": "special", "real/pipe.txt": "special"}
    assert left_out == {**links, **special, ".hidden": "other", "__MACOSX": "other"}


def test_a_pipe_that_takes_the_place_of_a_file_does_not_hold_up(tmp_path: Path, png: bytes):
    put(tmp_path, "a.png", png)
    put(tmp_path, "b.png", png)
    put(tmp_path, "b.txt", "caption")
    listing = folder.list_source(str(tmp_path), folder.Fields())
    for name in ("a.png", "b.txt"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    reasons = [item.rejected.reason for item in listing.portions[0].read()]
    assert reasons == ["special", "bad caption"]


def test_sub_folders_are_classes_where_nothing_has_a_caption(tmp_path: Path, png: bytes, read_source):
    put(tmp_path, "train/golden_retriever/1.png", png)
    put(tmp_path, "test/cat\n of two lines/2.png", png)
    put(tmp_path, "3.png", png)
    kept, _ = read_source(tmp_path)
    assert {name: item.label for name, item in kept.items()} == {
        "train/golden_retriever/1.png": "golden_retriever",
        "test/cat\N{REPLACEMENT CHARACTER} of two lines/2.png": "cat\N{REPLACEMENT CHARACTER} of two lines",
        "3.png": None,
    }
    put(tmp_path, "3.txt", "with a caption, folders are no classes")
    assert {item.label for item in read_source(tmp_path)[0].values()} == {None}


def test_names_of_any_bytes_can_be_read_and_printed(tmp_path: Path, png: bytes, read_source):
    name = os.fsdecode(b"b\xe4r\x1b[31m.png")
    put(tmp_path, name, png)
    put(tmp_path, name.replace("png", "txt"), "a bear")
    kept, _ = read_source(tmp_path)
    assert list(kept) == ["b\ufffdr\ufffd[31m.png"] and next(iter(kept.values())).captions == ("a bear",)


@pytest.mark.parametrize("make", ["nothing", "no folder", "no picture"])
def test_a_source_without_pictures_is_one_line(make: str, tmp_path: Path, read_source):
    if make == "no picture":
        put(tmp_path, "in/IMG_1.HEIC", "")
    elif make == "nothing":
        (tmp_path / "in").mkdir()
    expected = {"nothing": "it has no file", "no folder": "there is no file", "no picture": "it has 1 of .heic"}
    with pytest.raises(UserError, match=expected[make]):
        read_source(tmp_path / "in")


def test_pictures_of_other_kinds_are_named_with_what_to_do(tmp_path: Path, png: bytes):
    put(tmp_path, "a.png", png)
    put(tmp_path, "b.heic", b"")
    (item,) = folder.list_source(str(tmp_path), folder.Fields()).ignored
    assert (item.name, item.rejected.reason, item.rejected.detail) == ("b.heic", "other", "convert it to JPEG or PNG")
