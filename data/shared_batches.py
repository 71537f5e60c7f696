"""Memory that a process shares with those that read for it, so that pictures are not sent through a pipe.

A block is a file without a name (memfd), which ends with the processes that have it open, however they end. Linux has
them; elsewhere there are no blocks, and batches are sent as before.
"""

import collections
import math
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_NAMED = (-1, -1)
_ALIGNED = 64  # bytes: what XLA asks of an array that it takes without a copy

Place = tuple[int, tuple[int, ...], str]  # of an array in a block: its first byte, shape and dtype


class Block(NamedTuple):
    """What a process needs to open a block: the one that made it, its descriptor there, which file that is, its bytes.

    A descriptor that was closed soon stands for another file, which a process that comes late must not write to.
    """

    process: int
    descriptor: int
    file: tuple[int, int]  # device and inode
    size: int


class Blocks:
    """Blocks of one size. One is free again once nobody holds an array that lies in it."""

    def __init__(self):
        self._free: collections.deque[tuple[Block, mmap.mmap]] = collections.deque()
        self._size = 0

    def take(self, size: int) -> tuple[Block, np.ndarray] | None:
        """A block of that many bytes or more, and its bytes; None where there are none."""
        if size > self._size:  # the others go with their arrays
            self._size, self._free = size, collections.deque()
        try:
            block, memory = self._free.popleft() if self._free else self._make()
        except (AttributeError, OSError):  # another system than Linux; no memory
            return None
        free = self._free
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, free.append, (block, memory)).atexit = False
        return block, array

    def _make(self) -> tuple[Block, mmap.mmap]:
        descriptor = os.memfd_create("tessera-batch")
        try:
            os.posix_fallocate(descriptor, 0, self._size)  # which is refused here, and not when it is written to
            memory = mmap.mmap(descriptor, self._size)
            if _file_of(descriptor) == _NAMED:  # and not to be told from other files
                raise OSError
        except OSError:
            os.close(descriptor)
            raise
        weakref.finalize(memory, os.close, descriptor)
        return Block(os.getpid(), descriptor, _file_of(descriptor), self._size), memory


_opened: dict[Block, mmap.mmap] = {}  # by this process, of another


def write_rows(
    block: Block, examples: Sequence[Mapping[str, np.ndarray]], first: int, rows: int
) -> dict[str, Place] | None:
    """Writes some examples of a batch into a block.

    Args:
      block: of the process that asks for them.
      examples: all of the same shapes, as those of the whole batch are.
      first: the row of the first one.
      rows: of the whole batch.

    Returns:
      Where the arrays of the whole batch lie; None if they do not fit, or the block cannot be opened.
    """
    places: dict[str, Place] = {}
    end = 0
    for name, value in examples[0].items():
        places[name] = (end, (rows, *value.shape), value.dtype.str)
        end += -(-rows * value.nbytes // _ALIGNED) * _ALIGNED
    if end > block.size:
        return None
    if block not in _opened and not _open(block):
        return None
    array = np.frombuffer(_opened[block], np.uint8)
    for name, place in places.items():
        np.stack([example[name] for example in examples], out=view(array, place)[first : first + len(examples)])
    return places


def _open(block: Block) -> bool:
    """Opens a block of another process; False if it is gone."""
    if any(other.size != block.size for other in _opened):
        _opened.clear()
    try:
        descriptor = os.open(f"/proc/{block.process}/fd/{block.descriptor}", os.O_RDWR)
    except OSError:
        return False
    try:
        if _file_of(descriptor) != block.file:
            return False
        _opened[block] = mmap.mmap(descriptor, block.size)
    finally:
        os.close(descriptor)
    return True


def _file_of(descriptor: int) -> tuple[int, int]:
    """The device and the inode of a file without a name; of any other `_NAMED`."""
    status = os.fstat(descriptor)
    return _NAMED if status.st_nlink else (status.st_dev, status.st_ino)


def view(array: np.ndarray, place: Place) -> np.ndarray:
    """An array in the bytes of a block, which it keeps from being free."""
    start, shape, dtype = place
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return array[start : start + size].view(dtype).reshape(shape)


def bytes_of(batch: Mapping[str, np.ndarray]) -> int:
    """How large a block has to be for a batch."""
    return sum(-(-value.nbytes // _ALIGNED) * _ALIGNED for value in batch.values())
