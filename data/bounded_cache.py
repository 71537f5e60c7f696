"""A cache whose memory has a bound in bytes, whatever texts it is asked for."""

import collections
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedCache(Generic[T]):
    """The values of texts, the least recently used ones dropped first; safe between threads.

    Long texts are not kept: there are few of each, and one of them costs as much as a thousand usual ones.
    """

    def __init__(self, max_bytes: int, longest: int, size: Callable[[T], int]):
        """Makes an empty cache.

        Args:
          max_bytes: that all texts and values take together, as `size` estimates them.
          longest: number of letters of a text that is kept.
          size: of a value, in bytes.
        """
        self._max_bytes, self._longest, self._size = max_bytes, longest, size
        self._values: collections.OrderedDict[str, T] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, text: str) -> T | None:
        """The value of a text; None if it is not kept."""
        with self._lock:
            value = self._values.get(text)
            if value is not None:
                self._values.move_to_end(text)
            return value

    def put(self, text: str, value: T) -> None:
        """Keeps a value, unless its text is long."""
        if len(text) > self._longest:
            return
        with self._lock:
            if text in self._values:
                return
            self._values[text] = value
            self.num_bytes += self._cost(text, value)
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= self._cost(*self._values.popitem(last=False))

    def _cost(self, text: str, value: T) -> int:
        return 4 * len(text) + self._size(value)
