"""Times this project's program and another project's in one process, in alternating windows."""

import os
import time
from collections.abc import Callable, Mapping

from cost.timing import Spread

Run = Callable[[int], None]  # does so many steps, and returns when the last is done


def time_in_turn(
    runs: Mapping[str, Run],
    *,
    windows: int,
    steps: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Spread]:
    """Seconds of a step of each; what else the machine does meanwhile hits all alike.

    Args:
      runs: by label.
      windows: how many times to measure each.
      steps: in a window.
      warmup: steps of each before the first window; compilation is in them.
      clock: seconds.
    """
    for run in runs.values():
        run(warmup)
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(windows):
        for label, run in runs.items():
            start = clock()
            run(steps)
            seconds[label].append((clock() - start) / steps)
    return {label: Spread.of(values) for label, values in seconds.items()}


def print_side_by_side(seconds: Mapping[str, Spread], what: str) -> None:
    """Prints seconds of a `what` for each, and how many times as long as the first the others take."""
    first, *others = seconds
    for label, spread in seconds.items():
        print(f"{label}: {spread.median:.3f} s a {what} ({spread.low:.3f} to {spread.high:.3f})", flush=True)
    for label in others:
        print(f"ratio, {label} over {first}: {seconds[label].median / seconds[first].median:.2f}")


def use_all_cores() -> None:
    """Gives torch as many threads as XLA has."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
