"""Tar archives as img2dataset and WebDataset write them: `key.jpg` beside `key.txt` or `key.json`, in any order.

Nothing is extracted. An archive is read in stream, twice: for its captions, then for its pictures, one in memory at a
time. Links, devices and names that lead out of a folder are left out and named. What a header claims is bounded before
memory is taken for it, and so is what a compressed archive may expand to.
"""

import dataclasses
import gzip
import io
import os
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from cli.locations import Location, in_store
from cli.plurals import spell_count
from data.folder.captions import captions_of_sidecars, class_of_value, decode_text, readable
from data.folder.items import (
    ALONE,
    MAX_PICTURE,
    MAX_TEXT,
    PICTURES,
    Item,
    Listing,
    Portion,
    Rejected,
    fingerprint_of_files,
    open_file,
    shown,
)
from data.folder.tables import Fields

SUFFIXES = (".tar", ".tar.gz", ".tgz")

MAX_ARCHIVE_TEXT = 2**29  # bytes of captions that one archive may have, in memory while it is read
MAX_EXPANSION = 200  # times its own size that a compressed archive may expand to
MIN_EXPANSION = 2**30  # bytes that any may expand to
_MAX_HEADER = 2**20  # bytes that describe one member

_TEXTS = (".txt", ".json", ".cls")
_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, RecursionError, OverflowError)


@dataclasses.dataclass(frozen=True)
class TarPortion(Portion):
    """One archive.

    Attributes:
      path: of it.
      name: that is shown.
      fields: that were asked for, of JSON files.
    """

    path: Location
    name: str
    fields: Fields

    def read(self) -> Iterator[Item]:
        """Yields pictures in the order of the archive, and what is left out of it."""
        texts, times = self._texts()
        used: set[str] = set()
        seen: Counter[tuple[str, str]] = Counter()
        try:
            for member, stream in _members(self.path):
                name = f"{self.name}: {shown(member.name)}"
                try:
                    if not _is_kept(member):
                        continue
                    key, suffix = _key(member.name)
                    if suffix in PICTURES:
                        sample = _sample(member.name)
                        used.update((key, sample))
                        seen[key, suffix] += 1
                        number = seen[key, suffix]
                        beside = {**texts.get(sample, {}), **texts.get(key, {})}
                        data = _data(member, stream, MAX_PICTURE)
                        yield self._item(name, data, _paired(beside, number, max(number, times[key, suffix])))
                    elif suffix not in _TEXTS:
                        raise Rejected("other")
                except Rejected as rejected:
                    yield Item(name, rejected=rejected)
        except _ERRORS as error:
            detail = f"{' '.join(str(error).split()) or type(error).__name__}; what follows is lost"
            yield Item(self.name, rejected=Rejected("unreadable", detail))
        for key in (key for key in texts if key not in used):
            yield Item(f"{self.name}: {shown(key)}", rejected=Rejected("other", ALONE))

    def _item(self, name: str, data: bytes, texts: dict[str, bytes | Rejected]) -> Item:
        captions, label = captions_of_sidecars(texts, self.fields.text, self.fields.label)
        if label is None and ".cls" in texts:
            label = class_of_value(decode_text(readable(texts[".cls"])))
        return Item(name, data, captions, label)

    def _texts(self) -> tuple[dict[str, dict[str, list[bytes | Rejected]]], Counter[tuple[str, str]]]:
        """Captions, and how often each picture's name occurs.

        Returns:
          Key -> suffix -> what the files of this name hold, in order, or why they cannot be read; and (key, suffix) of
          a picture -> its number.
        """
        texts: dict[str, dict[str, list[bytes | Rejected]]] = {}
        times: Counter[tuple[str, str]] = Counter()
        size = 0
        try:
            for member, stream in _members(self.path):
                key, suffix = _key(member.name)
                if not _is_kept(member, quiet=True):
                    continue
                if suffix in PICTURES:
                    times[key, suffix] += 1
                if suffix not in _TEXTS:
                    continue
                try:
                    if size > MAX_ARCHIVE_TEXT:
                        raise Rejected("bad caption", f"more than {MAX_ARCHIVE_TEXT:,} bytes of captions in an archive")
                    data: bytes | Rejected = _data(member, stream, MAX_TEXT)
                except Rejected as rejected:
                    data = Rejected("bad caption", rejected.detail)
                texts.setdefault(key, {}).setdefault(suffix, []).append(data)
                size += 300 + len(key) + (len(data) if isinstance(data, bytes) else 0)
                if size > 2 * MAX_ARCHIVE_TEXT:  # of names alone
                    break
        except _ERRORS:
            pass  # said when the pictures are read
        return texts, times


def _paired(texts: Mapping[str, Sequence[bytes | Rejected]], number: int, times: int) -> dict[str, bytes | Rejected]:
    """The texts of the `number`th of `times` pictures of one name: archives that were joined have names repeatedly.

    Raises:
      Rejected: if it cannot be told which text belongs to it, since there are more or fewer than pictures.
    """
    for suffix, found in texts.items():
        if len(found) != times:
            detail = f"the archive has {spell_count(times, 'picture')} of this name, and {len(found):,} of {suffix}"
            raise Rejected("bad caption", detail)
    return {suffix: found[number - 1] for suffix, found in texts.items()}


def list_archives(paths: Sequence[tuple[str, Location]], fields: Fields) -> Listing:
    """Archives by the names that are shown; each is a portion."""
    portions = [TarPortion(path, name, fields) for name, path in paths]
    kind = spell_count(len(portions), "tar archive")
    return Listing(kind, portions, fingerprint_of_files(paths), notes=["captions of the files beside each picture"])


def is_archive(name: str) -> bool:
    """Whether a file's name is that of an archive."""
    return name.lower().endswith(SUFFIXES)


def stem_of_archive(name: str) -> str:
    """An archive's name without its suffix, all of it."""
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), name)


def _key(name: str) -> tuple[str, str]:
    """What a picture and its captions have in common, and the suffix in which they differ."""
    path = PurePosixPath(unicodedata.normalize("NFC", name))  # macOS takes letters and accents apart
    return str(path.with_suffix("")) if path.name else name, path.suffix.lower()


def _sample(name: str) -> str:
    """The key to the first dot, as WebDataset has it: 000.txt is the caption of 000.image.png if it has none closer."""
    path = PurePosixPath(unicodedata.normalize("NFC", name))
    return str(path.with_name(path.name.partition(".")[0] or path.name)) if path.name else name


def _is_kept(member: tarfile.TarInfo, quiet: bool = False) -> bool:
    """Whether a member is a file to look at; False for a folder.

    Raises:
      Rejected: if it is something that an archive of pictures has no use for, unless `quiet`.
    """
    try:
        _check_kind(member)
    except Rejected:
        if quiet:
            return False
        raise
    return not member.isdir()


def _check_kind(member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise Rejected("outside", "not extracted, and not read")
    if member.issym() or member.islnk():
        raise Rejected("link", f"to {shown(member.linkname)[:200]}")
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        raise Rejected("special", "no plain file")
    if any(part.startswith(".") and part != "." or part == "__MACOSX" for part in path.parts):
        raise Rejected("other", "hidden")


def _data(member: tarfile.TarInfo, stream: "_Forward", limit: int) -> bytes:
    """The bytes of the member that the stream has come to."""
    if member.size > limit:
        raise Rejected("too large", f"{member.size:,} bytes")
    stream.allowed = member.size
    data = stream.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return data


def _members(path: Location) -> Iterator[tuple[tarfile.TarInfo, "_Forward"]]:
    """The members of an archive in order, each with the stream, which has come to its first byte."""
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END) if in_store(path) else os.fstat(file.fileno()).st_size
        file.seek(0)
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = _Forward(file, size, compressed)
        with tarfile.TarFile(fileobj=stream, mode="r", errors="surrogateescape") as archive:
            while True:
                stream.allowed = _MAX_HEADER
                member = archive.next()
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  (it would keep all of them)
                if member is None:
                    break
                yield member, stream
        if stream.last.strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {stream.position:,}")
        end = stream.position
        while stream.skip():
            if stream.last.strip(b"\0"):
                raise tarfile.ReadError(f"more follows the end of the archive at byte {end:,}; extract it, if joined")


class _Forward:
    """A file that is read forward only and never further than is allowed, as `tarfile` needs one."""

    def __init__(self, file: io.BufferedReader, size: int, compressed: bool):
        self.position = 0
        self.allowed = _MAX_HEADER  # bytes until it is set again
        self.last = b""  # what was read last
        self._file = gzip.GzipFile(fileobj=file) if compressed else file
        self._limit = max(MIN_EXPANSION, MAX_EXPANSION * size) if compressed else None

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        if size > self.allowed:
            raise tarfile.ReadError(f"a header of more than {_MAX_HEADER:,} bytes")
        self.allowed -= size
        return self._advance(size)

    def seek(self, position: int) -> int:
        if position < self.position:
            raise tarfile.ReadError("a header leads backwards")
        if self._limit is None:
            self.position = self._file.seek(position)
        while self.position < position:
            if not self._advance(min(2**20, position - self.position)):
                break
        return self.position

    def skip(self) -> bool:
        """Reads on by a mebibyte at most; False at the end."""
        return bool(self._advance(2**20))

    def _advance(self, size: int) -> bytes:
        self.last = self._file.read(size)
        self.position += len(self.last)
        if self._limit is not None and self.position > self._limit:
            raise tarfile.ReadError(f"it expands to {self.position:,} bytes and more")
        return self.last
