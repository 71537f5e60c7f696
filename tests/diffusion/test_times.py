"""Grids: published times, ends, and what is refused."""

import numpy as np
import pytest

from diffusion.schedule import DiscreteSchedule, FlowSchedule, VPSchedule
from diffusion.solver_choice import make_plan
from diffusion.times import TimeGrid, continuous_grid, discrete_grid, karras_noise, timesteps

STABLE_DIFFUSION = DiscreteSchedule("scaled_linear", start=0.00085, end=0.012)


def test_times_of_stable_diffusion():
    assert timesteps("leading", 50, 1000, offset=1)[[0, 1, 2, -2, -1]].tolist() == [981, 961, 941, 21, 1]
    assert timesteps("leading", 10, 1000).tolist() == list(range(900, -1, -100))
    assert timesteps("linspace", 10, 1000)[:2].tolist() == [999, 888]
    assert timesteps("trailing", 10, 1000)[[0, 1, -1]].tolist() == [999, 899, 99]
    assert timesteps("linspace", 20, 1000, intervals=True)[[0, 1, -2, -1]].tolist() == [999, 949, 100, 50]


@pytest.mark.parametrize("total", [40, 1000])
@pytest.mark.parametrize("intervals", [False, True])
def test_leading_times_begin_later_with_every_step_and_are_published_where_they_divide(total, intervals):
    firsts = []
    for num in range(2, total - intervals + 1):
        points = num + intervals
        times = timesteps("leading", num, total, intervals=intervals)
        if total % points == 0:
            expected = np.arange(int(intervals), points)[::-1] * (total // points)
            assert times.tolist() == expected.tolist()
        assert len(times) == num and times[0] >= total - 1 - total / points
        firsts.append(times[0])
    assert np.all(np.diff(firsts) >= 0)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras"])
@pytest.mark.parametrize("intervals", [False, True])
def test_one_step_begins_where_the_chain_ends(spacing, intervals):
    assert discrete_grid(STABLE_DIFFUSION, 1, spacing, intervals=intervals).t.tolist() == [999, 0]


def test_published_times_begin_late_where_steps_do_not_divide_the_chain():
    assert timesteps("leading", 30, 1000, offset=1, published=True)[[0, 1, -1]].tolist() == [958, 925, 1]
    assert timesteps("leading", 501, 1000, published=True)[0] == 500
    assert timesteps("leading", 30, 1000, intervals=True, published=True)[[0, -1]].tolist() == [960, 32]
    assert timesteps("leading", 1, 1000, offset=1, published=True).tolist() == [1]
    assert timesteps("linspace", 1, 1000, published=True).tolist() == [0]
    assert timesteps("leading", 50, 1000, published=True).tolist() == timesteps("leading", 50, 1000).tolist()


def test_samplers_as_stable_diffusion_has_them():
    published = {"times": "published", "offset": 1, "end": "first"}
    plan = make_plan(STABLE_DIFFUSION, "ddim", 20, **published)
    assert plan.t[[0, -1]].tolist() == [951, 1] and plan.first_scale == pytest.approx(1)
    # To the noise of time 0, from that of 1: a step to clean data would forget the state.
    assert plan.state[-1] == pytest.approx(float(STABLE_DIFFUSION.sigma(0.0) / STABLE_DIFFUSION.sigma(1.0)))
    euler = make_plan(STABLE_DIFFUSION, "euler", 20, **published)
    assert euler.t[0] == 999 and euler.state[-1] == 0
    assert euler.first_scale == pytest.approx(float(STABLE_DIFFUSION.sigma(999.0))) != 1
    assert make_plan(STABLE_DIFFUSION, "euler", 20).first_scale == pytest.approx(1)
    leading = make_plan(STABLE_DIFFUSION, "euler", 20, spacing="leading", **published)
    assert leading.t[0] == 951 and leading.first_scale == pytest.approx(1)
    for settings, message in (
        ({"times": "even "}, "unknown times 'even '"),
        ({"end": "last"}, "unknown end 'last'"),
        ({"offset": -1}, "offset=-1 is impossible"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(STABLE_DIFFUSION, "ddim", 20, **settings)
    with pytest.raises(ValueError, match="of a chain's steps"):
        make_plan(FlowSchedule(), "euler", 20, offset=1)


def test_noise_of_stable_diffusion_at_ten_karras_steps():
    expected = [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292, 0]
    np.testing.assert_allclose(discrete_grid(STABLE_DIFFUSION, 10, "karras").noise, expected, atol=1e-4)


def test_noise_of_stable_diffusion_at_twenty_intervals():
    noise = discrete_grid(STABLE_DIFFUSION, 20, "linspace", intervals=True).noise
    np.testing.assert_allclose(noise[[0, 1, -2, -1]], [14.6146, 10.9042, 0.22558, 0], rtol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("num", [1, 5, 13, 50, 999])
@pytest.mark.parametrize("intervals", [False, True])
def test_a_grid_has_the_steps_that_were_asked_for_and_ends_clean(spacing, num, intervals):
    grid = discrete_grid(STABLE_DIFFUSION, num, spacing, intervals=intervals)
    assert len(grid) == num
    assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)


def test_the_first_time_can_be_the_end():
    offset = discrete_grid(STABLE_DIFFUSION, 50, offset=1, end="first")
    assert offset.sigma[-1] == pytest.approx(STABLE_DIFFUSION.sigma(0.0))
    plain = discrete_grid(STABLE_DIFFUSION, 50, end="first")
    assert (len(offset), len(plain)) == (50, 49)  # the last of these times is the end itself


@pytest.mark.parametrize("spacing", ["time", "log_snr", "karras"])
def test_continuous_grids_lie_between_their_ends(spacing):
    grid = continuous_grid(VPSchedule(), 7, spacing, time_min=1e-3)
    assert len(grid) == 7
    assert grid.t[[0, -1]] == pytest.approx([1, 1e-3], rel=1e-9)
    clean = continuous_grid(VPSchedule(), 7, spacing, time_min=1e-3, clean=True)
    assert len(clean) == 7
    assert clean.sigma[-1] == 0


def test_log_snr_spacing_is_even_in_lambda():
    steps = np.diff(continuous_grid(VPSchedule(), 7, "log_snr", time_min=1e-3).log_snr)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


def test_karras_levels_are_even_in_their_seventh_root():
    roots = karras_noise(80.0, 0.002, 18) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-9)


def test_flow_reaches_the_data_by_itself():
    grid = continuous_grid(FlowSchedule(), 4)
    assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timesteps("even", 5, 10), "unknown spacing 'even'; choose one of leading"),
        (lambda: timesteps("leading", 11, 10), "11 steps are not between 1 and 10"),
        (lambda: timesteps("leading", 0, 10), "0 steps are not between 1"),
        (lambda: timesteps("linspace", 40, 40, intervals=True), "40 steps are not between 1 and 39"),
        (lambda: timesteps("linspace", 1, 1, intervals=True), "a chain of one step has no interval"),
        (lambda: TimeGrid(np.full(3, np.nan), np.full(3, np.nan), np.full(3, np.nan)), "are not finite"),
        (lambda: TimeGrid(np.array([2.0, 1, 0]), np.ones(3), np.array([2.0, np.inf, 0])), "are not finite"),
        (
            lambda: TimeGrid(np.array([2.0, 1, 0]), np.array([0.0, 0, 1]), np.array([1.0, 1, 0])),
            "less noise after each",
        ),
        (lambda: discrete_grid(STABLE_DIFFUSION, 5, end="zero"), "unknown end 'zero'; choose clean or first"),
        (
            lambda: discrete_grid(DiscreteSchedule(zero_terminal_snr=True), 5, "karras"),
            "zero terminal SNR has none",
        ),
        (lambda: continuous_grid(VPSchedule(), 0), "0 steps are too few"),
        (lambda: continuous_grid(VPSchedule(), 5, "leading"), "unknown spacing 'leading'; choose one of time"),
        (lambda: continuous_grid(VPSchedule(), 5, time_min=2.0), "do not lie in the schedule's"),
    ],
)
def test_an_impossible_grid_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
