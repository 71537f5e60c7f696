"""Processes that this one starts for its work: they leave signals to it, and never outlive it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Keeps SIGINT and SIGTERM, which reach the whole group, from processes that are started meanwhile, for good."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def end_with_parent(stop: Connection | None = None) -> None:
    """Has this process, which another one started, end when that one does, whatever it is at.

    Args:
      stop: one end of a pipe; closing the other end, which the parent alone holds, ends this process too.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    ends = [parent.sentinel] if stop is None else [parent.sentinel, stop]

    def watch() -> None:
        wait(ends)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
