"""Two programs side by side, with a clock of our own."""

import pytest

from cost.side_by_side import Effort, Side, measure_side_by_side


def measure(durations, **options):
    """Each run takes the next number of seconds a step; returns (report, the labels in turn)."""
    now, turns = [0.0], []
    left = iter(durations)

    def side(label):
        def run(count):
            turns.append(label)
            now[0] += next(left) * count

        return Side(run, flops=lambda: 10)

    sides = {"jax": side("jax"), "torch": side("torch")}
    effort = Effort(windows=3, steps=2, warmup=1, attempts=2)
    return measure_side_by_side(sides, effort, clock=lambda: now[0], **options), turns


def test_windows_alternate_and_the_ratio_is_of_neighbours():
    # The machine halves its speed behind the second window: medians alone would say 1.0 for what is 2 all along.
    report, turns = measure([9.0, 9.0, 7.0, 1.0, 1.0, 2.0, 1.0, 2.0, 1.2, 2.4], units=4, peak=40.0)
    assert turns == ["jax", "torch"] * 5
    ours = report["sides"]["jax"]
    assert ours["seconds"] == {"median": 0.25, "low": 0.25, "high": pytest.approx(0.3)}  # of a unit
    assert (ours["flops_per_second"], ours["mfu"]) == (10.0, 0.25)  # of a step
    assert report["ratios"]["torch"] == pytest.approx({"median": 2.0, "low": 2.0, "high": 2.0})
    assert not report["noise"] and report["attempts"] == 1 and report["spread"] == pytest.approx(1.2)


def test_a_peer_with_noise_is_measured_again_and_the_quietest_attempt_is_kept():
    noisy, quiet = [1.0, 2.0, 1.0, 3.0, 1.0, 2.0], [1.0, 2.0, 1.0, 2.5, 1.0, 2.0]
    report, turns = measure([1.0] * 4 + noisy + quiet)
    assert len(turns) == 4 + 12 and report["attempts"] == 2
    assert report["noise"] is False and report["spread"] == 1.25
    report, _ = measure([1.0] * 4 + noisy + [2 * each for each in noisy])
    assert report["noise"] is True and report["sides"]["torch"]["seconds"]["high"] == 3.0


def test_a_peer_that_does_not_run_is_left_out_and_said():
    def fail(_):
        raise RuntimeError("no kernel\nfor it")

    sides = {"jax": Side(lambda count: None), "compiled": Side(fail), "torch": Side(lambda count: None)}
    report = measure_side_by_side(sides, Effort(attempts=1))
    assert report["failed"] == {"compiled": "RuntimeError: no kernel for it"}
    assert list(report["sides"]) == ["jax", "torch"] and list(report["ratios"]) == ["torch"]
    with pytest.raises(RuntimeError):
        measure_side_by_side({"jax": Side(fail)}, Effort())
