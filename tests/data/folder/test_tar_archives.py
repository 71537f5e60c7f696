"""Tar archives: captions beside pictures in any order, and archives that were made to do harm."""

import gzip
import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import folder

from .damaged import add_member

DANGEROUS = "/tmp/tessera-must-not-appear"


def write(path: Path, members: list[tuple[str, bytes]], mode: str = "w", **attributes: object) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            add_member(archive, name, data, **attributes)
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_captions_are_found_wherever_they_stand(name: str, tmp_path: Path, png: bytes, read_source):
    members = [
        ("./x/1.txt", b"first\nor so"),
        ("x/2.png", png),
        ("./x/1.png", png),
        ("3.json", b'{"caption": "of json", "kind": "cat", "sha256": "0"}'),
        ("3.PNG", png),
        ("3.txt", b"of text"),
        ("4.jpg", png),
        ("4.cls", b"17"),
        ("x/2.txt", b"second"),
        ("e\u0301.png", png),
        ("\u00e9.txt", b"an accent"),
    ]
    path = write(tmp_path / name, members, "w" if name == "a.tar" else "w:gz")
    kept, left_out = read_source(path)
    short = {key.removeprefix(f"{name}: "): item for key, item in kept.items()}
    assert {key: item.captions for key, item in short.items()} == {
        "x/2.png": ("second",),
        "./x/1.png": ("first", "or so"),
        "3.PNG": ("of text",),
        "4.jpg": (),
        "e\u0301.png": ("an accent",),
    }
    assert short["4.jpg"].label == 17 and short["x/2.png"].data == png and not left_out
    kept, _ = read_source(path, text="caption", label="kind")
    assert kept[f"{name}: 3.PNG"].captions == ("of json",) and kept[f"{name}: 3.PNG"].label == "cat"


def test_a_caption_of_the_key_to_the_first_dot_is_taken_where_none_is_closer(tmp_path: Path, png: bytes, read_source):
    members = [("x/0.front.png", png), ("x/0.side.png", png), ("x/0.txt", b"of both"), ("x/0.side.txt", b"of one")]
    kept, left_out = read_source(write(tmp_path / "a.tar", members))
    assert [item.captions for item in kept.values()] == [("of both",), ("of one",)] and not left_out


def test_classes_beside_pictures_are_numbers_that_may_be_hidden(tmp_path: Path, png: bytes, read_source):
    texts = [b"3", b"-1\n", b"7.0", b"x" * 2**21]
    members = [
        (f"{index}.{kind}", data) for index, text in enumerate(texts) for kind, data in (("png", png), ("cls", text))
    ]
    kept, left_out = read_source(write(tmp_path / "a.tar", members))
    assert [item.label for item in kept.values()] == [3, None, 7] and left_out == {"a.tar: 3.png": "bad caption"}


def test_names_that_are_there_repeatedly_are_paired_in_order(tmp_path: Path, png: bytes, read_source):
    """As shards that were joined have them, of which each numbers its pictures from 0."""
    first = [("0.png", png + b"A"), ("0.txt", b"a red ball"), ("./0.png", png + b"B"), ("0.txt", b"a blue box")]
    more = [("1.png", png + b"C"), ("1.png", png + b"D"), ("1.txt", b"first"), ("1.txt", b"second"), ("1.txt", b"none")]
    last = [("2.a.png", png + b"E"), ("2.txt", b"green"), ("2.a.png", png + b"F"), ("2.txt", b"gray")]
    alone = [("3.png", png), ("3.png", png), ("3.txt", b"of which?")]
    listing = folder.list_source(str(write(tmp_path / "a.tar", [*first, *more, *last, *alone])), folder.Fields())
    items = list(listing.portions[0].read())
    assert {item.data.removeprefix(png): item.captions for item in items if item.rejected is None} == {
        b"A": ("a red ball",),
        b"B": ("a blue box",),
        b"E": ("green",),
        b"F": ("gray",),
    }
    assert [(item.name, *item.rejected.args) for item in items if item.rejected is not None] == [
        *[("a.tar: 1.png", "bad caption", "the archive has 2 pictures of this name, and 3 of .txt")] * 2,
        *[("a.tar: 3.png", "bad caption", "the archive has 2 pictures of this name, and 1 of .txt")] * 2,
    ]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_archive_that_is_joined_to_another_is_named(pack, tmp_path: Path, png: bytes, read_source):
    parts = [write(tmp_path / f"{name}.tar", [(f"{name}.png", png)]).read_bytes() for name in "ab"]
    path = tmp_path / "joined.tar"
    path.write_bytes(b"".join(pack(part) for part in parts))
    kept, left_out = read_source(path)
    assert list(kept) == ["joined.tar: a.png"] and left_out == {"joined.tar": "unreadable"}


def test_a_hostile_archive_writes_nothing_and_is_named(tmp_path: Path, png: bytes, read_source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = {"hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE, "node": tarfile.CHRTYPE, "disk": tarfile.BLKTYPE}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_member(archive, "good.png", png)
        add_member(archive, "good.txt", b"a caption")
        add_member(archive, f"{DANGEROUS}.png", png)
        add_member(archive, "../../up.png", png)
        add_member(archive, "x/../../up.txt", b"x")
        for name, kind in {**kinds, "pipe": tarfile.FIFOTYPE}.items():
            add_member(archive, f"{name}.png", b"", type=kind, linkname="/etc/passwd")
        add_member(archive, "folder", b"", type=tarfile.DIRTYPE)
        add_member(archive, "._good.png", b"resource fork")
        add_member(archive, "tool.sh", b"#!/bin/sh")
        add_member(archive, "alone.txt", b"no picture")
    before = sorted(tmp_path.rglob("*"))
    kept, left_out = read_source(tmp_path / "a.tar")
    assert list(kept) == ["a.tar: good.png"]
    assert {name.removeprefix("a.tar: "): reason for name, reason in left_out.items()} == {
        f"{DANGEROUS}.png": "outside",
        "../../up.png": "outside",
        "x/../../up.txt": "outside",
        "hard.png": "link",
        "soft.png": "link",
        "node.png": "special",
        "disk.png": "special",
        "pipe.png": "special",
        "._good.png": "other",
        "tool.sh": "other",
        "alone": "other",
    }
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists(f"{DANGEROUS}.png")


def zeros(path: Path, before: bytes, mebibytes: int, after: bytes = b"") -> Path:
    """A compressed archive of a beginning, a great many zeros, and an end."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(before)
        for _ in range(mebibytes):
            file.write(bytes(2**20))
        file.write(after)
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def peak(call: Callable[[], Any]) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
def test_a_member_that_expands_without_end_takes_no_memory(kind: bytes, tmp_path: Path, png: bytes, read_source):
    """A picture, and each kind of header whose content a reader of tar keeps in memory, of 300 MiB."""
    picture = io.BytesIO()
    with tarfile.open(fileobj=picture, mode="w", format=tarfile.GNU_FORMAT) as archive:
        add_member(archive, "a.png", png)
    first = picture.getvalue()[: 512 + (len(png) + 511) // 512 * 512]
    path = zeros(tmp_path / "a.tar.gz", first + header("b.png", 300 << 20, kind), 300)
    assert path.stat().st_size < 2**21
    (kept, left_out), memory = peak(lambda: read_source(path))
    assert list(kept) == ["a.tar.gz: a.png"] and memory < 8 << 20
    assert set(left_out.values()) == {"too large" if kind == tarfile.REGTYPE else "unreadable"}


def test_what_a_compressed_archive_may_expand_to_is_bounded(tmp_path: Path, png: bytes, read_source, monkeypatch):
    monkeypatch.setattr("data.folder.tar_archives.MIN_EXPANSION", 2**22)
    with tarfile.open(fileobj=(whole := io.BytesIO()), mode="w") as archive:
        add_member(archive, "a.png", png)
        add_member(archive, "b.bin", bytes(50 << 20))
        add_member(archive, "c.png", png)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(whole.getvalue()))
    kept, left_out = read_source(path)
    assert list(kept) == ["a.tar.gz: a.png"] and left_out["a.tar.gz"] == "unreadable"


@pytest.mark.parametrize("damage", ["cut in a picture", "cut in a header", "damaged header", "no archive", "cut gzip"])
def test_a_damaged_archive_gives_what_stands_before_the_damage(damage: str, tmp_path: Path, png: bytes, read_source):
    names = ["a.png", "b.png", "c.png"]
    path = write(tmp_path / "a.tar", [(name, png) for name in names])
    data = bytearray(path.read_bytes())
    start = 512 + (len(png) + 511) // 512 * 512  # of the second header
    expected = {"a.tar: a.png"}
    match damage:
        case "cut in a picture":
            data = data[: start + 512 + 10]
        case "cut in a header":
            data = data[: start + 100]
        case "damaged header":
            data[start + 10] ^= 255
        case "no archive":
            data, expected = bytearray(b"<html>" * 1000), set()
        case "cut gzip":
            whole = gzip.compress(bytes(data))
            data = bytearray(whole[: len(whole) // 2])
    path.write_bytes(data)
    kept, left_out = read_source(path)
    assert left_out == {"a.tar": "unreadable"}
    assert set(kept) == expected or (damage == "cut gzip" and len(kept) < 3)


@pytest.mark.parametrize("size", [-1024, -(2**40), 2**60])
def test_a_size_that_lies_ends_the_archive(size: int, tmp_path: Path, png: bytes, read_source):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add_member(archive, "a.png", png)
        member = tarfile.TarInfo("b.png")
        member.pax_headers = {"size": str(size)}
        archive.addfile(member)
        add_member(archive, "c.png", png)
    kept, left_out = read_source(path)
    assert list(kept) == ["a.tar: a.png"] and "unreadable" in left_out.values()


def test_a_chain_of_headers_ends_the_archive(tmp_path: Path, read_source):
    path = tmp_path / "a.tar"
    path.write_bytes(header("x", 0, tarfile.XHDTYPE) * 20_000)
    kept, left_out = read_source(path)
    assert not kept and left_out == {"a.tar": "unreadable"}


def test_captions_of_an_archive_are_bounded(tmp_path: Path, png: bytes, read_source, monkeypatch):
    monkeypatch.setattr("data.folder.tar_archives.MAX_ARCHIVE_TEXT", 3_000)
    texts = [(f"{index}.txt", b"x" * 700) for index in range(9)]
    path = write(
        tmp_path / "a.tar", [*texts, *[(f"{index}.png", png) for index in range(9)], ("big.txt", b"x" * 2**21)]
    )
    kept, left_out = read_source(path)
    assert [name for name, item in kept.items() if item.captions] == [f"a.tar: {index}.png" for index in range(3)]
    assert left_out["a.tar: 3.png"] == "bad caption"
