"""How far a run has come, on the terminal."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


class ProgressBar:
    """A bar with rate, remaining time and loss on a terminal; a line every few seconds elsewhere."""

    def __init__(
        self, total: int, initial: int, label: str, seconds_between_lines: float = 10.0, *, unit: str = "step"
    ):
        """Starts at step `initial` of `total`, or whatever `unit` is counted."""
        self._bar = tqdm(
            total=total, initial=initial, desc=label, unit=unit, dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._label, self._total, self._first, self._unit = label, total, initial, unit
        self._start = self._last_line = time.monotonic()
        self._every = seconds_between_lines

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows that `step` updates are done, and their loss, if there is one."""
        loss = f"{values['loss']:.4f}" if "loss" in values else ""
        if not self._bar.disable:
            if loss:
                self._bar.set_postfix({"loss": loss}, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line >= self._every or step == self._total:
            rate = (step - self._first) / max(now - self._start, 1e-9)
            left = int((self._total - step) / max(rate, 1e-9))
            print(
                f"{self._label}: {self._unit} {step}/{self._total}, {rate:.1f} {self._unit}s/s, "
                f"{left // 60}:{left % 60:02d} left" + (f", loss {loss}" if loss else ""),
                flush=True,
            )
            self._last_line = now

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
