"""What was passed over or cut while records were read: counted, and the first of each kind said."""

import threading

DAMAGED, INCOMPLETE, TRUNCATED = "damaged", "incomplete", "truncated"

_WORDS = {
    TRUNCATED: "records with a caption cut",
    DAMAGED: "records damaged",
    INCOMPLETE: "records without a caption or class",
}


class Tally:
    """Counts by kind, added to by threads; those of other processes are merged into one that speaks."""

    def __init__(self) -> None:
        self.speaks = True  # prints the first line of each kind; otherwise it waits for `take`
        self._lock = threading.Lock()
        self._places: dict[str, set[int]] = {}
        self._lines: dict[str, str] = {}
        self._new: dict[str, set[int]] = {}

    def add(self, kind: str, place: int, line: str) -> None:
        """Counts a record or example once, whatever threads meet it how often.

        Args:
          kind: one of this module.
          place: its number.
          line: what to say if it is the first of its kind.
        """
        with self._lock:
            places = self._places.setdefault(kind, set())
            if place not in places:
                places.add(place)
                self._new.setdefault(kind, set()).add(place)
            first = kind not in self._lines
            if first:
                self._lines[kind] = line
        if first and self.speaks:
            print(f"warning: {line}", flush=True)

    def places(self, kind: str) -> set[int]:
        """The numbers that were counted."""
        with self._lock:
            return set(self._places.get(kind, ()))

    def has(self, kind: str, place: int) -> bool:
        """Whether this one was counted."""
        return place in self._places.get(kind, ())

    def __str__(self) -> str:
        """How many of what; empty if there are none."""
        with self._lock:
            counts = {kind: len(self._places.get(kind, ())) for kind in _WORDS}
        return "; ".join(f"{words}: {counts[kind]}" for kind, words in _WORDS.items()) if any(counts.values()) else ""

    def take(self) -> list[tuple[str, int, str]]:
        """What was added since the last call, as arguments of `add`."""
        with self._lock:
            new, self._new = self._new, {}
            return [(kind, place, self._lines[kind]) for kind, places in new.items() for place in sorted(places)]
