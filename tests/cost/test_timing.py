"""Windows of repeated work, with a clock of our own."""

import pytest

from cost.timing import Spread, time_windows


def test_a_window_is_divided_by_its_steps_and_the_warm_up_is_not_counted():
    now, calls = [0.0], []
    durations = iter([100.0, 3.0, 1.0, 8.0])

    def run(count: int) -> None:
        calls.append(count)
        now[0] += next(durations) * count

    spread = time_windows(run, windows=3, steps=4, warmup=2, clock=lambda: now[0])
    assert spread == Spread(median=3.0, low=1.0, high=8.0)
    assert calls == [2, 4, 4, 4]


def test_the_longest_time_is_the_lowest_rate():
    rate = Spread(median=2.0, low=1.0, high=4.0).rate(8.0)
    assert rate == Spread(median=4.0, low=2.0, high=8.0)
    assert rate.over(16.0) == Spread(median=0.25, low=0.125, high=0.5)


def test_without_a_warm_up_nothing_runs_before_the_windows():
    calls = []
    time_windows(calls.append, windows=1, steps=1, warmup=0)
    assert calls == [1]
    with pytest.raises(ValueError):
        Spread.of([])
