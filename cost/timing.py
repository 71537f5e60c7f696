"""Wall-clock time of repeated work, in windows."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Run = Callable[[int], None]  # does so many steps, and returns when the last is done


@dataclasses.dataclass(frozen=True)
class Spread:
    """What several windows gave.

    Attributes:
      median: of the windows.
      low: the least of them.
      high: the greatest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value for each window."""
        return cls(statistics.median(values), min(values), max(values))

    def rate(self, amount: float | int) -> "Spread":
        """How much is done a second, if this is the seconds that `amount` takes."""
        return Spread(amount / self.median, amount / self.high, amount / self.low)

    def over(self, unit: float | int) -> "Spread":
        """This, in units of `unit`."""
        return Spread(self.median / unit, self.low / unit, self.high / unit)


def time_windows(
    run: Run,
    *,
    windows: int,
    steps: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Spread:
    """Seconds that one step takes.

    Args:
      run: does so many steps, and returns when the last is done.
      windows: how many times to measure.
      steps: in a window; nothing waits for a device between them.
      warmup: steps before the first window.
      clock: seconds.
    """
    if warmup:
        run(warmup)
    seconds = []
    for _ in range(windows):
        start = clock()
        run(steps)
        seconds.append((clock() - start) / steps)
    return Spread.of(seconds)


def time_in_turn(
    runs: Mapping[str, Run], *, windows: int, steps: int, warmup: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[tuple[float, float]]]:
    """Seconds that a step of each takes, windows in turn: what else the machine does slows all down alike.

    Args:
      runs: by label.
      windows: how many times to measure each.
      steps: in a window.
      warmup: steps of each before the first window.
      clock: seconds.

    Returns:
      For each window (seconds by the clock, processor seconds of this process, of all its threads).
    """
    if warmup:
        for run in runs.values():
            run(warmup)
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in runs}
    for _ in range(windows):
        for label, run in runs.items():
            start, used = clock(), time.process_time()
            run(steps)
            seconds[label].append(((clock() - start) / steps, (time.process_time() - used) / steps))
    return seconds
