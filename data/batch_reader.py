"""Batches of a stream, read ahead by threads or by processes.

Threads suffice where reading is little work: pictures are decoded without the interpreter's lock. Processes share no
lock at all, and leave that of the training process alone. Batches are the same, to the bit, whoever reads them.
"""

import collections
import contextlib
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from cli.errors import UserError
from data.child_processes import end_with_parent, signals_blocked
from data.pipeline import Example, ExampleStream, Stream

_FEWEST_ROWS = 8  # of a batch that are worth a task of their own

_Task = Future[tuple[Example, list[tuple[str, int, str]]]]


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
        self._processes = processes and isinstance(stream, ExampleStream)
        self._pool: Executor = (
            _process_pool(stream, workers)
            if self._processes
            else ThreadPoolExecutor(workers, thread_name_prefix="data")
        )
        self._ready: collections.deque[list[_Task]] = collections.deque()
        for _ in range(max(1, read_ahead, math.ceil((workers + 1) / self._parts))):
            self._submit()

    def __next__(self) -> Example:
        try:
            parts = [task.result() for task in self._ready.popleft()]
        except BrokenProcessPool as error:
            raise UserError(
                "a process that reads data was killed, most likely for memory; lower config.data.workers or read_ahead"
            ) from error
        self._submit()
        for _, counted in parts:
            for item in counted:
                self._stream.tally.add(*item)
        examples = [example for example, _ in parts]
        if len(examples) == 1:
            return examples[0]
        return {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}

    def close(self) -> None:
        """Stops the workers; what they were reading is lost."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        indices = [self._next + row for row in self._rows]
        self._next += self._batch_size
        read = _read_in_process if self._processes else self._read
        bounds = [len(indices) * part // self._parts for part in range(self._parts + 1)]
        parts = [indices[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
        with signals_blocked() if self._processes else contextlib.nullcontext():
            self._ready.append([self._pool.submit(read, part) for part in parts])

    def _read(self, indices: list[int]) -> tuple[Example, list[tuple[str, int, str]]]:
        return self._stream.batch(indices), []


def _process_pool(stream: ExampleStream, workers: int) -> ProcessPoolExecutor:
    """Processes that know the stream. They are started afresh: one that is forked from threads may hang."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_process, (stream,))


_stream: ExampleStream | None = None  # of this process, where it is one that reads


def _begin_process(stream: ExampleStream) -> None:
    """Makes a process that reads: it lives as long as its parent."""
    global _stream
    end_with_parent()
    _stream = stream
    _stream.tally.speaks = False


def _read_in_process(indices: list[int]) -> tuple[Example, list[tuple[str, int, str]]]:
    assert _stream is not None
    batch = _stream.batch(indices)
    return batch, _stream.tally.take()
