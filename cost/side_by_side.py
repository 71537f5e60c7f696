"""A program of this project beside another that does the same work: windows in turn, and noise called by its name."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from cost.timing import Run, Spread, time_in_turn

NOISY = 1.3  # greatest window of a peer over its least: beyond, something else ran, and the row is measured again
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the programs.

    Attributes:
      run: does so many steps, and returns when the last is done.
      flops: counts the matrix FLOPs of a step, behind the windows; None where nobody does.
      compile_seconds: that it took before the first step; None where the first step compiles.
      memory: bytes that it occupies at its peak, asked after the windows; None where that is not known.
      reads: counts the bytes that a step cannot but read of the device's memory; None where nobody does.
      attention: the implementations of it in the compiled program (`cost.hlo.read_attention`); () where nobody looked.
    """

    run: Run
    flops: Callable[[], int] | None = None
    compile_seconds: float | None = None
    memory: Callable[[], int | None] | None = None
    reads: Callable[[], int] | None = None
    attention: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
      windows: of each side, in turn.
      steps: in a window.
      warmup: steps of each before the first window, one that is not counted; what compiles late is in them.
      attempts: how often at most all windows are measured, until no peer's are noise.
    """

    windows: int = 7
    steps: int = 2
    warmup: int = 2
    attempts: int = 3


def measure_side_by_side(
    sides: Mapping[str, Side],
    effort: Effort,
    *,
    units: int = 1,
    peak: float | None = None,
    memory_rate: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Times all sides.

    Args:
      sides: by label; the first is this project's.
      effort: how much is measured.
      units: of what is counted, in one step: pictures in a call of a sampler, tokens of an answer.
      peak: FLOPs a second that the device can do, for MFU; None for none.
      memory_rate: bytes a second that it can read, for the share of that; None for none.
      clock: seconds.

    Returns:
      sides: {label: seconds of a unit {"median", "low", "high"}, and where known flops_per_second, mfu,
        memory_rate_share, memory_bytes, compile_seconds, attention}.
      ratios: {label: a peer's seconds over this project's of the window before, median, low and high}: above 1 this
        project is faster.
      spread: the greatest of the peers' greatest window over least; of this project's where it has no peer.
      noise: whether that is more than `NOISY` in the attempt with the least of it, which the figures are of.
      attempts: that were made.
      failed: {label: what it said} of peers that did not run; the others were measured without them.
      load_average: of the machine, a minute's, before and after; [] where the system does not tell.
    """
    before, tried = _load(), []
    failed = _warm_up(sides, effort.warmup)
    sides = {label: side for label, side in sides.items() if label not in failed}
    ours, *peers = sides
    runs = {label: side.run for label, side in sides.items()}
    # A round that is not counted: the first steps behind another program's touch memory that is new to the process.
    time_in_turn(runs, windows=1, steps=effort.steps, warmup=0, clock=clock)
    for _ in range(effort.attempts):
        taken = time_in_turn(runs, windows=effort.windows, steps=effort.steps, warmup=0, clock=clock)
        seconds = {label: [window for window, _ in windows] for label, windows in taken.items()}
        spread = max(max(seconds[label]) / max(min(seconds[label]), 1e-12) for label in peers or [ours])
        tried.append((spread, seconds))
        if spread <= NOISY:
            break
    spread, seconds = min(tried, key=lambda each: each[0])
    pairs = {label: zip(seconds[label], seconds[ours], strict=True) for label in peers}
    return {
        "sides": {
            label: _figures(side, Spread.of(seconds[label]), units, peak, memory_rate) for label, side in sides.items()
        },
        "ratios": {
            label: dataclasses.asdict(Spread.of([theirs / own for theirs, own in each]))
            for label, each in pairs.items()
        },
        "spread": spread,
        "noise": spread > NOISY,
        "attempts": len(tried),
        "failed": failed,
        "load_average": [*before, *_load()],
    }


def _warm_up(sides: Mapping[str, Side], steps: int) -> dict[str, str]:
    """Runs each; returns what peers said that failed, as a compiler of other people's that does not take a network."""
    ours, failed = next(iter(sides)), {}
    for label, side in sides.items():
        try:
            side.run(steps)
        except Exception as error:  # whatever other people's programs raise
            if label == ours:
                raise
            failed[label] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return failed


def _figures(side: Side, seconds: Spread, units: int, peak: float | None, memory_rate: float | None) -> dict[str, Any]:
    """What is reported of one side."""
    memory = side.memory() if side.memory is not None else None
    rate = side.flops() / seconds.median if side.flops is not None else None
    read = side.reads() / seconds.median if side.reads is not None else None
    figures = {
        "seconds": dataclasses.asdict(seconds.over(units)),
        "flops_per_second": rate,
        "mfu": rate / peak if rate is not None and peak else None,
        "memory_rate_share": read / memory_rate if read is not None and memory_rate else None,
        "memory_bytes": memory,
        "compile_seconds": side.compile_seconds,
        "attention": list(side.attention) or None,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _load() -> list[float]:
    return [os.getloadavg()[0]] if hasattr(os, "getloadavg") else []
