"""Batches of a stream, read ahead by threads or by processes.

Threads suffice where reading is little work: pictures are decoded without the interpreter's lock. Processes share no
lock at all, and leave that of the training process alone. Batches are the same, to the bit, whoever reads them.
"""

import collections
import itertools
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from cli.allocator import keep_freed_memory
from cli.errors import UserError
from data.child_processes import end_with_parent, signals_blocked
from data.pipeline import Example, ExampleStream, Stream, stack_examples
from data.shared_batches import Block, Blocks, Place, bytes_of, view, write_rows

_FEWEST_ROWS = 8  # of a batch that are worth a task of their own
_NOTHING = np.zeros(0, np.uint8)  # in place of a block


class _Part(NamedTuple):
    """What a worker has read of a batch: arrays, or in their place where those of the whole batch lie in its block."""

    arrays: Example
    places: dict[str, Place]
    counted: list[tuple[str, int, str]]


class BatchReader(Iterator[Example]):
    """Batches of a stream, for the rows that one process of a run feeds.

    Row r of the global batch that follows `examples_seen` examples is `stream[examples_seen + r]`.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        batch_size: int,
        rows: Sequence[int],
        examples_seen: int,
        workers: int = 1,
        read_ahead: int = 4,
        processes: bool = False,
    ):
        """Starts reading.

        A batch is read in parts, by as many workers as it has rows for; so many batches are begun that none is idle.

        Args:
          stream: where examples come from.
          batch_size: of the global batch.
          rows: the rows of the global batch to read here, in the order wanted.
          examples_seen: where to begin.
          workers: that read.
          read_ahead: batches kept ready.
          processes: workers are processes instead of threads. Points are made in threads: that is no work.
        """
        self._stream, self._batch_size, self._rows, self._next = stream, batch_size, tuple(rows), examples_seen
        workers = max(1, workers)
        self._parts = max(1, min(workers, len(self._rows) // _FEWEST_ROWS))
        bounds = [len(self._rows) * part // self._parts for part in range(self._parts + 1)]
        self._bounds = list(itertools.pairwise(bounds))
        self._processes = processes and isinstance(stream, ExampleStream)
        self._pool: Executor = (
            _process_pool(stream, workers)
            if self._processes
            else ThreadPoolExecutor(workers, thread_name_prefix="data")
        )
        self._blocks, self._bytes = Blocks(), 0  # that a batch has taken so far
        self._ready: collections.deque[tuple[list[Future[_Part]], np.ndarray]] = collections.deque()
        for _ in range(max(1, read_ahead, math.ceil((workers + 1) / self._parts))):
            self._submit()

    def __next__(self) -> Example:
        tasks, shared = self._ready.popleft()
        try:
            parts = [task.result() for task in tasks]
        except BrokenProcessPool as error:
            raise UserError(
                "a process that reads data was killed, most likely for memory; lower config.data.workers or read_ahead"
            ) from error
        self._submit()
        for part in parts:
            for item in part.counted:
                self._stream.tally.add(*item)
        if all(part.places for part in parts):
            return {name: view(shared, place) for name, place in parts[0].places.items()}
        examples = [
            part.arrays or {name: view(shared, place)[start:stop] for name, place in part.places.items()}
            for part, (start, stop) in zip(parts, self._bounds, strict=True)
        ]
        batch = examples[0]
        if len(examples) > 1:
            batch = {name: np.concatenate([example[name] for example in examples]) for name in batch}
        self._bytes = max(self._bytes, bytes_of(batch))
        return batch

    def close(self) -> None:
        """Stops the workers; what they were reading is lost."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        indices = [self._next + row for row in self._rows]
        self._next += self._batch_size
        parts = [(indices[start:stop], start) for start, stop in self._bounds]
        if not self._processes:
            self._ready.append(([self._pool.submit(self._read, part) for part, _ in parts], _NOTHING))
            return
        # How large a batch is, the first ones tell, which are sent.
        block, shared = (self._blocks.take(self._bytes) if self._bytes else None) or (None, _NOTHING)
        with signals_blocked():
            tasks = [self._pool.submit(_read_in_process, *part, block, len(indices)) for part in parts]
        self._ready.append((tasks, shared))

    def _read(self, indices: list[int]) -> _Part:
        return _Part(self._stream.batch(indices), {}, [])


def _process_pool(stream: ExampleStream, workers: int) -> ProcessPoolExecutor:
    """Processes that know the stream. They are started afresh: one that is forked from threads may hang."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_process, (stream,))


_stream: ExampleStream | None = None  # of this process, where it is one that reads


def _begin_process(stream: ExampleStream) -> None:
    """Makes a process that reads: it lives as long as its parent."""
    global _stream
    end_with_parent()
    keep_freed_memory()
    _stream = stream
    _stream.tally.speaks = False


def _read_in_process(indices: list[int], first: int, block: Block | None, rows: int) -> _Part:
    """Reads a part of a batch of so many rows, from its row `first` on, into the batch's block if there is one."""
    assert _stream is not None
    examples = [_stream[index] for index in indices]
    places = write_rows(block, examples, first, rows) if block is not None else None
    return _Part({} if places else stack_examples(examples), places or {}, _stream.tally.take())
