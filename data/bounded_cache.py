"""A cache whose memory has a bound in bytes, whatever it is asked for."""

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedCache(Generic[T]):
    """The values of texts, or of numbers, the least recently used ones dropped first; safe between threads.

    Long texts are not kept: there are few of each, and one of them costs as much as a thousand usual ones.
    """

    def __init__(self, max_bytes: int, longest: int, size: Callable[[T], int], *, drops: bool = True):
        """Makes an empty cache.

        Args:
          max_bytes: that all texts and values take together, as `size` estimates them.
          longest: number of letters of a text that is kept.
          size: of a value, in bytes.
          drops: whether what comes later takes the place of others. Where all keys come in turn, as in epochs, each
            would be dropped before it is asked for again: what is full then stays as it is.
        """
        self._max_bytes, self._longest, self._size, self._drops = max_bytes, longest, size, drops
        self._values: collections.OrderedDict[Hashable, T] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, key: Hashable) -> T | None:
        """The value of a text or a number; None if it is not kept."""
        with self._lock:
            value = self._values.get(key)
            if value is not None and self._drops:
                self._values.move_to_end(key)
            return value

    def put(self, key: Hashable, value: T) -> None:
        """Keeps a value, unless its text is long, or there is no room and nothing is to be dropped."""
        if isinstance(key, str) and len(key) > self._longest:
            return
        cost = self._cost(key, value)
        with self._lock:
            if key in self._values or (not self._drops and self.num_bytes + cost > self._max_bytes):
                return
            self._values[key] = value
            self.num_bytes += cost
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= self._cost(*self._values.popitem(last=False))

    def _cost(self, key: Hashable, value: T) -> int:
        return (4 * len(key) if isinstance(key, str) else 8) + self._size(value)
