"""What every source of pictures is read as: items one by one, and the reason why one is left out."""

import abc
import dataclasses
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cli.errors import UserError
from cli.locations import Location, explain, in_store, locate
from data.pictures import MAX_BYTES

MAX_PICTURE = MAX_BYTES  # of a picture's file that are read
MAX_TEXT = 2**20  # bytes of the captions of one picture, and of a line or a field of a table

PICTURES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
    + (".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".pnm", ".apng", ".dib", ".mpo")
)

# What cameras and programs write that is not read.
CONVERTIBLE = frozenset(
    (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".ico")
)
ALONE = "a caption without a picture"

REASONS = {
    "corrupt": "the picture cannot be decoded",
    "no caption": "others have captions, this one has none",
    "bad caption": "its caption is not UTF-8, not JSON, too long, or not told from another picture's",
    "duplicate": "the same pixels as an earlier one",
    "too small": "its short side is below --min_size",
    "too large": f"more than {MAX_PICTURE >> 20} MiB in one file",
    "missing": "a row names a picture that is not there",
    "outside": "a name that is absolute or leads out of its folder or archive",
    "link": "a link to a folder or out of the source, or one inside an archive",
    "special": "a pipe, a device or another thing that is no file",
    "unreadable": "a file, a row, a member or a whole archive that cannot be read",
    "other": "neither a picture nor a caption of one",
}


class Rejected(Exception):
    """Something is left out, for a reason of `REASONS`; `detail` says more of it."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # what it is made of again after pickling
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture as a source gives it, or something that it leaves out.

    Attributes:
      name: as a person finds it in the source.
      data: the bytes of the picture's file; empty for what is left out.
      captions: of the picture; there may be none.
      label: its class, by name or number; None for none.
      rejected: why it is left out; None where it is not.
    """

    name: str
    data: bytes = b""
    captions: tuple[str, ...] = ()
    label: str | int | None = None
    rejected: Rejected | None = None


class Portion(abc.ABC):
    """A part of a source that one process reads at once; it can be pickled, and always reads the same items."""

    @abc.abstractmethod
    def read(self) -> Iterator[Item]:
        """Yields its items in order, the bytes of one picture in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """A source, looked through but not yet read.

    Attributes:
      kind: what it is, in words.
      portions: its parts, in order.
      fingerprint: changes with what is read of the source, as far as names, sizes and times of change tell.
      ignored: what was left out already.
      notes: sentences for the user: which fields were taken, what was guessed.
      class_names: names of the classes where labels are numbers; () where they are not known.
    """

    kind: str
    portions: Sequence[Portion]
    fingerprint: str
    ignored: Sequence[Item] = ()
    notes: Sequence[str] = ()
    class_names: tuple[str, ...] = ()


def shown(name: str) -> str:
    """A file's name as text that can be printed and stored, whatever bytes it has."""
    try:
        text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        text = name
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def is_number(name: str) -> bool:
    """Whether the name of a class is a number, which is no caption; `float` reads all of them."""
    return bool(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?", name))


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Raises:
      Rejected: if it is larger than `limit`, cannot be read, or is something that might never end.
    """
    try:
        # Without waiting: a pipe may have taken the place of the file that was listed.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("special", "no regular file")
            if status.st_size > limit:
                raise Rejected("too large", f"{status.st_size:,} bytes")
            data = file.read(limit + 1)
    except OSError as error:
        raise Rejected("unreadable", error.strerror or str(error)) from error
    if len(data) > limit:
        raise Rejected("too large", f"more than {limit:,} bytes")
    return data


def open_file(path: Location) -> io.BufferedReader:
    """Opens an archive or a table, on this machine without waiting: a pipe may stand where a file was listed."""
    if in_store(path):
        return io.BufferedReader(_StoredFile(path), 2**20)
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


class _StoredFile(io.RawIOBase):
    """A file in a store. What goes wrong on the way to it ends the work: it is no damage that could be passed over."""

    def __init__(self, path: Location):
        self._path = path
        self._file: Any = self._try(lambda: locate(path).open("rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self._try(lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            again = f"cannot read {self._path}: {error}; start the command again"
            raise explain(error) or UserError(again) from error


def fingerprint_of_files(files: Iterable[tuple[str, Location]], table: str = "") -> str:
    """A digest of the names, sizes and times of change of files, and of which of them is the one table, if one is."""
    digest = hashlib.blake2b(table.encode("utf-8", "surrogateescape"), digest_size=16)
    for name, path in files:
        try:
            status: Any = path.stat()
        except OSError:
            continue
        about = (status.length, status.mtime) if in_store(path) else (status.st_size, status.st_mtime_ns)
        digest.update(f"{name}\0{about[0]}\0{about[1]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
