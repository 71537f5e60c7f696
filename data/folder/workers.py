"""Tasks in several processes, which end with the one that started them, with a bar of progress."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, Pipe
from typing import Any

from tqdm import tqdm

from cli.errors import UserError
from data.child_processes import end_with_parent, signals_blocked


class Workers:
    """Processes that are started when they are first needed; `with Workers(2) as workers:` ends them."""

    def __init__(self, count: int):
        self._count = count
        self._pool: ProcessPoolExecutor | None = None
        self._stop: Connection | None = None  # closed, it ends the processes, also those that are busy

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if self._stop is not None:
            self._stop.close()

    def run(self, tasks: Sequence[Callable[[], int]], total: int, verb: str) -> None:
        """Calls every task, which returns a number of pictures.

        Args:
          tasks: what is left to do; they can be pickled.
          total: the number of tasks with those that were done before.
          verb: what is said of pictures in the bar.

        Raises:
          UserError: if a process was ended from outside.
        """
        with tqdm(total=total, initial=total - len(tasks), desc=verb, unit="portion", disable=None) as bar:
            pictures = 0
            for count in self._results(tasks):
                pictures += count
                bar.set_postfix_str(f"{pictures:,} pictures", refresh=False)
                bar.update()

    def _results(self, tasks: Sequence[Callable[[], int]]) -> Iterator[int]:
        if self._count <= 1 or (self._pool is None and len(tasks) <= 1):
            yield from (task() for task in tasks)
            return
        if self._pool is None:
            # A new interpreter for each: libraries here have threads, which a fork would leave behind.
            context = multiprocessing.get_context("spawn")
            pipe: tuple[Any, Any] = Pipe(duplex=False)  # of other types on Windows
            stopped, self._stop = pipe
            self._pool = ProcessPoolExecutor(self._count, context, end_with_parent, (stopped,))
        waiting: set[Future[int]] = set()
        try:
            for task in tasks:
                with signals_blocked():  # the process that is started, if any; it is ended from here
                    waiting.add(self._pool.submit(task))
                if len(waiting) >= 3 * self._count:  # not all at once: tasks hold the names of their files
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that read pictures was ended from outside, for lack of memory perhaps; run the same command "
                "again with fewer --workers, and it goes on where it was"
            ) from error
