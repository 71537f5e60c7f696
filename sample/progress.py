"""How far a command that draws is, for people who watch it."""

import sys

from tqdm import tqdm


class DrawingBar:
    """A bar over what is drawn and the sampler's steps, on the standard error of a terminal alone.

    It counts steps where the calls of a sampler say theirs, each as many, and otherwise what is drawn.

    Args:
      count: how many are drawn.
      calls: of the sampler.
    """

    def __init__(self, count: int, calls: int):
        self._count, self._calls, self._drawn, self._before = count, calls, 0, 0
        self._bar = tqdm(
            total=count, desc=f"drawing {count}", disable=None, leave=False, mininterval=0, file=sys.stderr
        )

    def __enter__(self) -> "DrawingBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def shown(self) -> bool:
        """Whether there is anybody to watch."""
        return not self._bar.disable

    def begin(self, steps: int) -> None:
        """A call begins, of so many steps; of 0 where it does not say them."""
        if self.shown and steps:
            self._before = self._bar.n
            self._bar.unit, self._bar.total = " steps", self._calls * steps
            self._bar.set_postfix_str(f"{self._drawn}/{self._count} drawn")

    def moved(self, step: int) -> None:
        """So many steps of the call are done."""
        self._bar.update(self._before + step - self._bar.n)

    def drew(self, count: int) -> None:
        """A call is done, which drew so many."""
        self._drawn += count
        if self.shown and self._bar.unit == "it":
            self._bar.update(count)
        elif self.shown:
            self._bar.set_postfix_str(f"{self._drawn}/{self._count} drawn")
