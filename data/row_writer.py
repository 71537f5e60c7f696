"""Rows of arrays written to .npy files by appending, here or in a store; what was interrupted goes on where it was."""

import contextlib
import io
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from cli.errors import UserError
from cli.locations import Location, create, in_store, open_upload

# In a store, rows wait for a part until there are so many bytes of them, or so many seconds are over.
_PART_BYTES, _PART_SECONDS = 2**23, 60.0

_CLAIM_SECONDS = 60.0  # between two signs of life of who writes into a store


class RowWriter:
    """Writes a .npy file of known shape by appending; what an interrupted one wrote is kept.

    Until `finish`, the file is called `<name>.part`. `StoredRowWriter` does the same in a store.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, *, depth: int, whole: int):
        """Begins, or goes on.

        Args:
          path: of the file.
          shape: of the array.
          dtype: of it.
          depth: how many of its leading dimensions count rows.
          whole: rows that are appended together: a file goes on at a multiple of them.

        Raises:
          UserError: if what is there has another shape, or a finished file lacks rows.
        """
        head = _header(shape, dtype)
        self._path, self._draft = path, path.with_name(path.name + ".part")
        self._dtype, self._shape = dtype, shape[depth:]
        self.total = int(np.prod(shape[:depth]))
        row_bytes = int(np.prod(self._shape)) * dtype.itemsize
        self.done = 0
        for there in (path, self._draft):
            if not there.is_file():
                continue
            with there.open("rb") as file:
                begins = file.read(len(head))
            if begins != head[: len(begins)]:
                raise _other_shape(there, shape, dtype)
            self.done = max(0, there.stat().st_size - len(head)) // row_bytes  # a header may have been cut short too
            break
        if path.is_file():
            if self.done != self.total:
                raise UserError(
                    f"{path} is damaged: it holds {self.done} of {self.total} rows; remove it to begin anew"
                )
            return
        self.done = self.done // whole * whole
        if not self.done:
            self._draft.write_bytes(head)
        os.truncate(self._draft, len(head) + self.done * row_bytes)

    def append(self, rows: Shaped[np.ndarray, "b *shape"]) -> None:
        """Adds rows."""
        with self._draft.open("ab") as file:
            file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self.done += len(rows)

    def finish(self) -> None:
        """Gives the file its name."""
        if self._path.is_file():
            return
        with self._draft.open("rb+") as file:
            os.fsync(file.fileno())
        self._draft.replace(self._path)


class StoredRowWriter:
    """`RowWriter` where there is no append: rows are put into a store in parts, which become one file in the end.

    A part is called `<name>.part-<number of its first row>`, and the first begins with the file's header. There may be
    one writer at a time, of which `Claim` makes sure.
    """

    def __init__(self, path: Location, shape: tuple[int, ...], dtype: np.dtype, *, depth: int, whole: int):
        """Begins, or goes on. Arguments and errors as of `RowWriter`; a part is a multiple of `whole` rows."""
        self._path, self._dtype, self._shape = path, dtype, shape[depth:]
        self._head, self._whole_shape = _header(shape, dtype), shape
        self._row_bytes = int(np.prod(self._shape)) * dtype.itemsize
        self.total = int(np.prod(shape[:depth]))
        self._kept: list[bytes] = []  # rows that no part has yet
        self._since = time.monotonic()
        self._finished = path.is_file() and self._is_whole()
        self.done = self.total if self._finished else 0
        while (part := self._part(self.done)).is_file() and self.done < self.total:
            size: Any = part.stat()
            if not self.done and _begin(part, len(self._head)) != self._head:
                raise _other_shape(part, shape, dtype)
            self.done += (size.length - (0 if self.done else len(self._head))) // self._row_bytes
        self._first = self.done  # of the next part

    def append(self, rows: Shaped[np.ndarray, "b *shape"]) -> None:
        """Adds rows, and puts a part if many wait or have waited for long."""
        self._kept.append(np.ascontiguousarray(rows, self._dtype).tobytes())
        self.done += len(rows)
        if sum(map(len, self._kept)) >= _PART_BYTES or time.monotonic() - self._since >= _PART_SECONDS:
            self._put()

    def finish(self) -> None:
        """Makes the file of its parts, and removes them."""
        if not self._finished and not (self._path.is_file() and self._is_whole()):  # another may have been quicker
            self._put()
            with tempfile.TemporaryFile() as whole:
                row = 0
                while row < self.total:
                    data = self._part(row).read_bytes()
                    whole.write(data)
                    row += (len(data) - (0 if row else len(self._head))) // self._row_bytes
                whole.seek(0)
                with open_upload(self._path) as sink:
                    shutil.copyfileobj(whole, sink, 2**20)
        for part in self._path.parent.glob(f"{self._path.name}.part-*"):
            part.unlink(missing_ok=True)

    def _is_whole(self) -> bool:
        """Whether all of the file is there: it may have been cut short when it was put together.

        Raises:
          UserError: if it is of another shape.
        """
        if _begin(self._path, len(self._head)) != self._head:
            raise _other_shape(self._path, self._whole_shape, self._dtype)
        size: Any = self._path.stat()
        return size.length == len(self._head) + self.total * self._row_bytes

    def _part(self, row: int) -> Location:
        return self._path.with_name(f"{self._path.name}.part-{row:012d}")

    def _put(self) -> None:
        if self._kept:
            self._part(self._first).write_bytes(b"".join(([] if self._first else [self._head]) + self._kept))
        self._kept, self._first, self._since = [], self.done, time.monotonic()


class Claim:
    """Keeps a second writer out of a folder in a store, which has no locks: an object `lock` that says who writes.

    It is written again every `_CLAIM_SECONDS`. One that was not for three times as long belongs to a process that is
    gone, and may be taken.
    """

    def __init__(self, folder: Location):
        """Claims a folder.

        Raises:
          UserError: if another process has it.
        """
        self._path, self._lost = folder / "lock", False
        self._own = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex})
        if not create(self._path, self._own) and self._holder() != self._own:  # a request may have been sent twice
            self._take_over()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="claim")
        self._thread.start()

    def check(self) -> None:
        """Raises UserError if the folder was taken by another process, which held this one for gone."""
        if self._lost:
            raise UserError(f"another process writes {self._path.parent} now; wait for it")

    def close(self) -> None:
        """Gives the folder back."""
        self._ended.set()
        self._thread.join()
        if self._holder() == self._own:
            self._path.unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Takes the place of a writer that is gone."""
        try:
            status: Any = self._path.stat()
            silent, holder = time.time() - status.mtime, json.loads(self._holder())
        except (FileNotFoundError, ValueError):
            silent, holder = 0.0, {}
        if silent < 3 * _CLAIM_SECONDS:
            who = f"process {holder.get('pid')} of {holder.get('host')}"
            raise UserError(
                f"another process is writing {self._path.parent} ({who}, {max(silent, 0):.0f} s ago); wait for it, or, "
                f"if it is gone, for {3 * _CLAIM_SECONDS:.0f} s"
            )
        self._path.unlink(missing_ok=True)
        if not create(self._path, self._own):
            raise UserError(f"another process is writing {self._path.parent}; wait for it")

    def _holder(self) -> str:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

    def _renew(self) -> None:
        while not self._ended.wait(_CLAIM_SECONDS):
            with contextlib.suppress(Exception):  # a store that does not answer: it is tried again
                if self._holder() != self._own:
                    self._lost = True
                    return
                self._path.write_text(self._own)


def open_writer(path: Location, shape: tuple[int, ...], dtype: np.dtype, **rows: int) -> RowWriter | StoredRowWriter:
    """What writes a file of rows where it lies. Arguments as of `RowWriter`."""
    return StoredRowWriter(path, shape, dtype, **rows) if in_store(path) else RowWriter(path, shape, dtype, **rows)


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """How a .npy file begins."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


def _begin(path: Location, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _other_shape(path: Location, shape: tuple[int, ...], dtype: np.dtype) -> UserError:
    return UserError(
        f"{path} was begun for another shape than {list(shape)} of {dtype}: another --views, or another dataset; "
        "remove it to begin anew"
    )
