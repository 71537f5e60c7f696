"""Schedules: published constants, signal and noise that fit together, times that can be found again."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.schedule import (
    SCHEDULES,
    DiscreteSchedule,
    FlowSchedule,
    SubVPSchedule,
    VESchedule,
    VPSchedule,
    betas,
    create_schedule,
)

CONTINUOUS = (VPSchedule(), SubVPSchedule(), VESchedule(), FlowSchedule())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (DiscreteSchedule("linear"), (0.99989998, 0.07858723, 4.035830e-05)),
        (DiscreteSchedule("scaled_linear", start=0.00085, end=0.012), (0.99914998, 0.27766943, 4.660095e-03)),
        (DiscreteSchedule("scaled_linear", start=0.0015, end=0.0195), (0.99849999, 0.11584447, 1.423039e-04)),
        (DiscreteSchedule("cosine"), (0.99995869, 0.49384347, 2.4287e-09)),
    ],
)
def test_alpha_bar_is_that_of_the_published_schedules(schedule, expected):
    # The constants were computed with betas in float32, of which the product of a thousand keeps five digits.
    np.testing.assert_allclose(schedule.alpha_bar[[0, 499, 999]], expected, rtol=5e-5)


def test_zero_terminal_snr_moves_the_last_step_to_noise_and_keeps_the_first():
    schedule = DiscreteSchedule("scaled_linear", start=0.00085, end=0.012, zero_terminal_snr=True)
    np.testing.assert_allclose(schedule.alpha_bar[[0, 499, 999]], (0.99914998, 0.242359, 0), rtol=2e-5)
    assert np.all(np.diff(schedule.alpha_bar) < 0)


def test_sohl_dickstein_removes_a_constant_fraction_of_the_signal():
    # 1 - beta_t = (T - t) / (T - t + 1), so the product falls along a line: by 1 / T a step, down to 1 / T.
    schedule = DiscreteSchedule("sohl_dickstein", steps=40)
    np.testing.assert_allclose(np.diff(schedule.alpha_bar), -1 / 40, rtol=0.1)
    assert betas("sohl_dickstein", 40, 0.0, 0.0)[-1] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=lambda schedule: type(schedule).__name__)
def test_the_sde_makes_the_marginals(schedule):
    # d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2, by central differences.
    t, h = np.linspace(0.05, 0.95, 7), 1e-5
    alpha_rate = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    np.testing.assert_allclose(alpha_rate, schedule.drift(t) * schedule.alpha(t), rtol=1e-6, atol=1e-9)
    rate = (schedule.sigma(t + h) ** 2 - schedule.sigma(t - h) ** 2) / (2 * h)
    expected = 2 * schedule.drift(t) * schedule.sigma(t) ** 2 + schedule.diffusion_squared(t)
    np.testing.assert_allclose(rate, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("schedule", [*CONTINUOUS, DiscreteSchedule()], ids=lambda schedule: type(schedule).__name__)
def test_a_time_is_found_again_by_its_noise(schedule):
    low, high = schedule.time_range
    t = np.linspace(low, high, 9)[1:-1]
    t = np.round(t) if isinstance(schedule, DiscreteSchedule) else t
    np.testing.assert_allclose(schedule.time_of_noise(schedule.sigma(t) / schedule.alpha(t)), t, rtol=1e-6)


@pytest.mark.parametrize("schedule", [*CONTINUOUS, DiscreteSchedule(steps=10)], ids=lambda s: type(s).__name__)
def test_jax_and_numpy_agree(schedule):
    low, high = schedule.time_range
    t = low + (high - low) * np.array([0.0, 0.25, 0.5, 0.9])
    for name in ("alpha", "sigma"):
        expected = getattr(schedule, name)(t)
        np.testing.assert_allclose(getattr(schedule, name)(jnp.asarray(t, jnp.float32)), expected, rtol=2e-4)


def test_variance_is_preserved_between_the_steps_of_a_chain():
    schedule = DiscreteSchedule()
    t = np.array([0.0, 3.25, 500.5, 999.0])
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1)
    assert np.all(np.diff(schedule.sigma(t)) > 0)


def test_schedules_can_be_static_arguments():
    assert len({create_schedule(name) for name in SCHEDULES} | {create_schedule("vp")}) == len(SCHEDULES)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("linear", {}, "no schedule is called 'linear'; choose one of discrete, vp"),
        ("vp", {"steps": 10}, "schedule 'vp' has no field steps; it has beta_min"),
        ("discrete", {"kind": "sqrt"}, "unknown betas 'sqrt'; choose one of linear"),
        ("discrete", {"end": 1.5}, "end=1.5 is impossible; it must be a beta above 0 and below 1"),
        ("discrete", {"start": -0.1, "kind": "scaled_linear"}, "start=-0.1 is impossible"),
        ("discrete", {"start": float("nan")}, "start=nan is impossible"),
        ("discrete", {"start": 1e-20}, "start=1e-20 is impossible; it must be large enough"),
        ("discrete", {"end": 0.9}, "end=0.9 with 1000 steps is impossible"),
        ("discrete", {"steps": 0}, "steps=0 is impossible; it must be a whole number of at least 1"),
        ("discrete", {"steps": -1}, "steps=-1 is impossible"),
        ("discrete", {"steps": 1, "zero_terminal_snr": True}, "steps=1 is impossible; .* at least 2"),
        *(("vp", {"beta_min": value}, "beta_min=.* is impossible") for value in (-1.0, float("nan"))),
        *(
            ("sub_vp", {"beta_max": value}, "beta_max=.* is impossible")
            for value in (-5.0, 0.0, 0.05, float("inf"), 1e6)
        ),
        *(("vp", {"time_min": value}, "time_min=.* above 0 and below 1") for value in (0.0, -0.5, 1.0, float("nan"))),
        *(("ve", {"sigma_min": value}, "sigma_min=.* is impossible") for value in (0.0, -1.0, float("nan"))),
        *(("ve", {"sigma_max": value}, "sigma_max=.* above sigma_min") for value in (0.0, -1.0, 0.01, float("inf"))),
        ("ve", {"time_min": -1.0}, "time_min=-1.0 is impossible"),
        *(("flow", {"time_min": value}, "time_min=.* is impossible") for value in (-0.5, 1.0, float("nan"))),
        *(("flow", {"time_max": value}, "time_max=.* above time_min") for value in (0.0, 2.0, float("nan"))),
    ],
)
def test_an_impossible_schedule_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        create_schedule(name, **fields)
