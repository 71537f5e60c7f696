"""Samplers on data whose exact denoiser is known: orders of convergence, distributions, network calls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import solvers
from diffusion.plan import advance, begin, per_example_noise, solve
from diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, SubVPSchedule, VESchedule, VPSchedule
from diffusion.solver_choice import SOLVERS, make_plan
from diffusion.times import TimeGrid, continuous_grid, discrete_grid

VP = VPSchedule()
PLANS = {
    "ddim": solvers.ddim,
    "euler": solvers.euler,
    "heun": solvers.heun,
    "plms": solvers.plms,
    "dpm_solver_multistep": functools.partial(solvers.dpm_solver_multistep, lower_order_final=False),
    "dpm_solver_singlestep": lambda grid: solvers.dpm_solver_singlestep(grid, solvers.fast_orders(len(grid))),
    "unipc": solvers.unipc,
    "unipc_3": functools.partial(solvers.unipc, order=3),
}


def _run(plan, denoise, x, keys=None):
    def run(x):
        noise = None if keys is None else per_example_noise(keys, x)
        return solve(plan, denoise, x, noise).x

    return np.asarray(jax.jit(run)(jnp.asarray(x, jnp.float32)))


def _end_in_float64(plan, denoise, x, noises=None):
    """What `solve` computes, in numpy: float32 would hide the order of a good solver."""
    y, past, changes = x, [], []
    for i in range(plan.evaluations):
        m = denoise(x, plan.t[i])
        if plan.change is not None:
            known = [past[0] - m if past else 0 * m, *changes]
            changes = [sum(factor * value for factor, value in zip(plan.change[i], known, strict=False)), *changes]
        if plan.corrector is not None:
            known = [x, y, m, *past]
            x = sum(factor * value for factor, value in zip(plan.corrector[i], known, strict=False))
        past = [m, *past]
        y = x if plan.starts[i] else y
        x = plan.state[i] * y + sum(factor * value for factor, value in zip(plan.model[i], past, strict=False))
        if plan.of_change is not None:
            x = x + sum(factor * value for factor, value in zip(plan.of_change[i], changes, strict=False))
        x = x + plan.noise[i] * noises[i] if noises and plan.noise[i] else x
    return x


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("ddim", 1),
        ("euler", 1),
        ("heun", 2),
        ("plms", 2),
        ("dpm_solver_multistep", 2),
        ("dpm_solver_singlestep", 2),
        ("unipc", 2.8),
        ("unipc_3", 2.5),
    ],
)
def test_the_error_falls_with_the_order_of_the_sampler(name, order, gaussian):
    x, errors = np.linspace(-3, 3, 13), []
    for steps in (40, 160):
        grid = continuous_grid(VP, steps, "log_snr", time_min=1e-3)
        end = _end_in_float64(PLANS[name](grid), gaussian.denoiser(VP), x)
        errors.append(np.abs(end - gaussian.end(grid, x)).max())
    measured = np.log(errors[0] / errors[1]) / np.log(4)
    assert order - 0.1 < measured < order + 1.2, errors


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("schedule", [SubVPSchedule(), VESchedule()], ids=lambda schedule: type(schedule).__name__)
def test_every_sampler_ends_where_the_ode_does(name, schedule, gaussian):
    grid = continuous_grid(schedule, 60, "log_snr", time_min=1e-3)
    x = np.linspace(-1, 1, 5) * grid.sigma[0] + grid.alpha[0] * gaussian.mean
    end = _run(PLANS[name](grid), gaussian.denoiser(schedule), x)
    np.testing.assert_allclose(end, gaussian.end(grid, x), atol=0.1 if name in ("ddim", "euler") else 0.01)


@pytest.mark.parametrize("name", PLANS)
def test_the_scan_computes_its_plan(name, gaussian):
    grid = discrete_grid(DiscreteSchedule(), 7, intervals=True)
    if name == "plms":
        grid = discrete_grid(DiscreteSchedule(), 7, offset=1, end="first")
    plan = PLANS[name](grid)
    denoise, x = gaussian.denoiser(DiscreteSchedule()), np.linspace(-2, 2, 5)
    np.testing.assert_allclose(_run(plan, denoise, x), _end_in_float64(plan, denoise, x), atol=2e-5)


def test_a_straight_flow_needs_one_step():
    # Data at one point: every path of the flow is a straight line.
    grid = continuous_grid(FlowSchedule(), 1)
    end = _run(solvers.euler(grid), lambda x, t: jnp.full_like(x, 0.3), np.linspace(-2, 2, 5))
    np.testing.assert_allclose(end, 0.3, atol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras"])
@pytest.mark.parametrize(("sampler", "steps"), [("plms", 2), ("plms", 3), ("plms", 10), ("heun", 2), ("unipc", 3)])
def test_data_at_one_point_are_found_from_almost_noise_alone(sampler, steps, spacing):
    # The first alpha is down to 5e-5 here, and what is divided by it must not cancel.
    plan = make_plan(DiscreteSchedule("cosine"), sampler, steps, spacing=spacing)
    end = _run(plan, lambda x, t: jnp.full_like(x, 0.3), np.linspace(-3, 3, 13))
    np.testing.assert_allclose(end, 0.3, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler", "dpm_solver_multistep", "unipc"])
def test_a_chain_of_any_number_of_steps_begins_where_its_noise_belongs(sampler, gaussian):
    schedule, x = DiscreteSchedule(), np.random.default_rng(0).standard_normal(2000)
    for steps in (1, 334, 501):
        plan = make_plan(schedule, sampler, steps, spacing="leading")
        end = _run(plan, gaussian.denoiser(schedule), plan.first_scale * x)
        assert abs(end.mean() - gaussian.mean) < 0.05
        assert end.std() < 0.02 if steps == 1 else abs(end.std() - gaussian.std) < 0.05


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_no_eta_draws_more_noise_than_a_state_may_have(eta):
    plan, grid = make_plan(DiscreteSchedule(), "ddim", 20, eta=eta), discrete_grid(DiscreteSchedule(), 20)
    assert np.all(np.square(plan.noise) <= np.square(grid.sigma[1:]) + 1e-12)


@pytest.mark.parametrize("sampler", [name for name in SOLVERS if name != "ddpm"])
@pytest.mark.parametrize(
    "schedule", [FlowSchedule(), DiscreteSchedule(zero_terminal_snr=True), VPSchedule()], ids=["flow", "zero_snr", "vp"]
)
def test_every_sampler_has_a_plan_or_a_reason(sampler, schedule, gaussian):
    impossible = {
        "zero_snr": ("heun", "reverse_sde", "flow_sde"),
        "flow": ("plms", "reverse_sde"),
        "vp": ("flow_sde",),
    }
    name = {FlowSchedule: "flow", DiscreteSchedule: "zero_snr"}.get(type(schedule), "vp")
    if sampler in impossible.get(name, ()):
        with pytest.raises(ValueError, match="noise alone|continuous time|schedule flow"):
            make_plan(schedule, sampler, 20)
        return
    plan = make_plan(schedule, sampler, 20)
    for field in ("t", "state", "model", "noise"):
        assert np.all(np.isfinite(getattr(plan, field)))
    if not plan.stochastic:
        x = np.linspace(-1, 1, 5)
        end = _end_in_float64(plan, gaussian.denoiser(schedule), x)
        # From noise alone the ODE of a Gaussian takes x to mean + std x, nearly so from almost noise alone.
        np.testing.assert_allclose(end, gaussian.mean + gaussian.std * x, atol=0.15)


def test_network_calls():
    grid = continuous_grid(VP, 20, "log_snr", time_min=1e-3)
    clean = discrete_grid(DiscreteSchedule(), 20)
    calls = {name: make(grid).evaluations for name, make in PLANS.items()}
    assert calls == {**dict.fromkeys(PLANS, 20), "heun": 40, "plms": 21}
    assert solvers.heun(clean).evaluations == 39  # the step to clean data is Euler's
    assert solvers.plms(discrete_grid(DiscreteSchedule(), 50, offset=1)).evaluations == 51


def test_each_step_calls_the_network_once(gaussian):
    traced = []

    def denoise(x, t):
        traced.append(1)
        return gaussian.denoiser(VP)(x, t)

    plan = solvers.unipc(continuous_grid(VP, 20, "log_snr", time_min=1e-3))
    jax.make_jaxpr(lambda x: solve(plan, denoise, x).x)(jnp.zeros(3))
    assert len(traced) == 1


@pytest.mark.parametrize(
    "make",
    [
        solvers.ddpm,
        functools.partial(solvers.ddpm, variance="large"),
        functools.partial(solvers.ddim, eta=1.0),
        functools.partial(solvers.ddim, eta=0.5),
        solvers.euler_ancestral,
    ],
    ids=["ddpm", "ddpm_large", "ddim_1", "ddim_half", "euler_ancestral"],
)
def test_stochastic_samplers_draw_the_data(make, gaussian):
    schedule, count = DiscreteSchedule(steps=200, end=0.1), 4000
    grid = discrete_grid(schedule, 200)
    keys = jax.random.split(jax.random.key(0), count)
    x = jax.vmap(jax.random.normal)(jax.random.split(jax.random.key(1), count))
    end = _run(make(grid), gaussian.denoiser(schedule), x, keys)
    # Four standard errors of the mean, and of the deviation beside what 200 steps leave of the variance "large".
    assert abs(end.mean() - gaussian.mean) < 4 * gaussian.std / count**0.5
    assert abs(end.std() - gaussian.std) < 4 * gaussian.std / (2 * count) ** 0.5 + 0.01


@pytest.mark.parametrize("schedule", [VP, SubVPSchedule(), VESchedule()], ids=lambda schedule: type(schedule).__name__)
def test_the_reverse_sde_draws_the_data(schedule, gaussian):
    count = 4000
    grid = continuous_grid(schedule, 500, time_min=1e-3)
    keys = jax.random.split(jax.random.key(0), count)
    x = grid.sigma[0] * jax.vmap(jax.random.normal)(jax.random.split(jax.random.key(1), count))
    end = _run(solvers.reverse_sde(grid, schedule), gaussian.denoiser(schedule), x, keys)
    assert abs(end.mean() - gaussian.mean) < 4 * gaussian.std / count**0.5 + 0.01
    assert abs(end.std() - gaussian.std) < 4 * gaussian.std / (2 * count) ** 0.5 + 0.02


def test_the_flow_s_sde_draws_the_data(gaussian):
    count, schedule = 4000, FlowSchedule()
    plan = make_plan(schedule, "flow_sde", 250)
    # 249 even steps to 0.04, and one to the data.
    np.testing.assert_allclose(plan.t, 1 - 0.96 / 249 * np.arange(250), atol=1e-12)
    keys = jax.random.split(jax.random.key(0), count)
    x = jax.vmap(jax.random.normal)(jax.random.split(jax.random.key(1), count))
    end = _run(plan, gaussian.denoiser(schedule), x, keys)
    assert abs(end.mean() - gaussian.mean) < 4 * gaussian.std / count**0.5 + 0.01
    assert abs(end.std() - gaussian.std) < 4 * gaussian.std / (2 * count) ** 0.5 + 0.02


def test_the_singlestep_solver_takes_a_chain_s_times_between_its_steps(gaussian):
    """U-ViT's authors: 50 calls of "fast" order 3, times evenly from 1000 to 1 as their network is told them."""
    chain = DiscreteSchedule("scaled_linear", start=0.00085, end=0.012)
    plan = make_plan(chain, "dpm_solver_singlestep", 50, spacing="time")
    np.testing.assert_allclose(plan.t + 1, np.linspace(1000, 1, 51)[:-1])
    assert np.flatnonzero(plan.starts).tolist() == list(range(0, 50, 3))
    np.testing.assert_allclose(plan.state[-1], chain.sigma(0.0) / plan.sigma[-2])  # the last step is of order 2
    x, denoise = np.linspace(-1, 1, 5), gaussian.denoiser(chain)
    exact = gaussian.end(continuous_grid(chain, 50), x)
    for steps, most in ((50, 1e-2), (800, 1e-5)):
        end = _end_in_float64(make_plan(chain, "dpm_solver_singlestep", steps, spacing="time"), denoise, x)
        assert np.abs(end - exact).max() < most


def test_edm_s_sampler_is_the_published_algorithm(gaussian):
    """Algorithm 1 of Karras et al. 2022 with its times: 18 steps, 35 calls."""
    schedule, steps = EDMSchedule(), 18
    plan = make_plan(schedule, "heun", steps)
    assert plan.evaluations == 35 and not plan.stochastic
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    times = np.append((high + np.arange(steps) / (steps - 1) * (low - high)) ** 7, 0.0)
    np.testing.assert_allclose(plan.t[::2], times[:-1])
    denoise, x = gaussian.denoiser(schedule), 80 * np.linspace(-1, 1, 5)
    expected = x
    for t, after in zip(times[:-1], times[1:], strict=True):
        slope = (expected - denoise(expected, t)) / t
        euler = expected + (after - t) * slope
        if after:
            slope = (slope + (euler - denoise(euler, after)) / after) / 2
        expected = expected + (after - t) * slope
    np.testing.assert_allclose(_end_in_float64(plan, denoise, x), expected, atol=1e-9)
    churned = make_plan(schedule, "heun", steps, churn=40.0, churn_min=0.05, churn_max=50.0, churn_noise=1.003)
    raised = (times[:-1] >= 0.05) & (times[:-1] <= 50)
    np.testing.assert_allclose(churned.t[::2], times[:-1] * (1 + raised * min(40 / steps, 2**0.5 - 1)))


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("scale", [1.003, 1.5])
def test_churn_is_the_published_algorithm(scale, strength, gaussian):
    """Algorithm 2 of Karras et al. 2022 with its noise, from its first time or a later one."""
    schedule, steps = EDMSchedule(), 18
    churn = {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0 if scale == 1.003 else 0.0, "churn_noise": scale}
    plan = make_plan(schedule, "heun", steps, strength=strength, **churn)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    times = np.append((high + np.arange(steps) / (steps - 1) * (low - high)) ** 7, 0.0)[-round(steps * strength) - 1 :]
    assert plan.first_sigma == pytest.approx(times[0])
    denoise, rng = gaussian.denoiser(schedule), np.random.default_rng(0)
    x, noises = times[0] * np.linspace(-1, 1, 5), rng.normal(size=(len(times) - 1, 5))
    expected = x
    for t, after, noise in zip(times[:-1], times[1:], noises, strict=True):
        gamma = min(40 / steps, 2**0.5 - 1) if 0.05 <= t <= (churn["churn_max"] or np.inf) else 0.0
        raised = t + gamma * t
        expected = expected + np.sqrt(raised**2 - t**2) * scale * noise
        slope = (expected - denoise(expected, raised)) / raised
        euler = expected + (after - raised) * slope
        if after:
            slope = (slope + (euler - denoise(euler, after)) / after) / 2
        expected = expected + (after - raised) * slope
    # The plan adds the noise of a step at the end of the one before, of which the last row is number 2 i - 1.
    drawn = {-1: noises[0], **{2 * i - 1: noise for i, noise in enumerate(noises) if i}}
    end = _end_in_float64(plan, denoise, x + plan.first_noise * noises[0], drawn)
    np.testing.assert_allclose(end, expected, atol=1e-9)


@pytest.mark.parametrize("spacing", ["time", "log_snr"])
def test_a_chain_s_times_between_its_steps_end_in_clean_data(spacing):
    plan = make_plan(DiscreteSchedule(), "ddim", 10, spacing=spacing)
    assert plan.evaluations == 10 and (plan.state[-1], plan.model[-1, 0]) == (0, 1)


def test_the_least_strength_is_one_step():
    assert make_plan(EDMSchedule(), "heun", 5, strength=1e-12).evaluations == 1


def test_churn_keeps_the_distribution(gaussian):
    levels = np.append(np.geomspace(10, 0.02, 40), 0.0)
    grid, count = TimeGrid(levels, np.ones(41), levels), 4000

    def denoise(x, sigma):
        return (gaussian.std**2 * x + sigma**2 * gaussian.mean) / (gaussian.std**2 + sigma**2)

    keys = jax.random.split(jax.random.key(0), count)
    x = 10 * jax.vmap(jax.random.normal)(jax.random.split(jax.random.key(1), count))
    plan = solvers.heun(grid, churn=10.0)
    assert plan.stochastic
    end = _run(plan, denoise, x, keys)
    assert abs(end.mean() - gaussian.mean) < 4 * gaussian.std / count**0.5 + 0.01
    assert abs(end.std() - gaussian.std) < 4 * gaussian.std / (2 * count) ** 0.5 + 0.01


def test_ddim_with_eta_one_is_ancestral_sampling():
    grid = discrete_grid(DiscreteSchedule(), 10)
    ancestral, ddim = solvers.ddpm(grid), solvers.ddim(grid, eta=1.0)
    for name in ("state", "model", "noise"):
        np.testing.assert_allclose(getattr(ddim, name), getattr(ancestral, name), rtol=1e-9, atol=1e-12)


def test_learned_variances_lie_between_small_and_large():
    grid = discrete_grid(DiscreteSchedule(), 10)
    x, keys = jnp.zeros((3, 2)), jax.random.split(jax.random.key(0), 3)
    ends = {}
    for name, fraction in (("small", 0.0), ("large", 1.0)):

        def denoise(x, t, fraction=fraction):
            return 0.5 * x, jnp.full_like(x, fraction)

        ends[name] = _run(solvers.ddpm(grid, "learned"), denoise, x, keys)
        fixed = _run(solvers.ddpm(grid, name), lambda x, t: 0.5 * x, x, keys)
        np.testing.assert_allclose(ends[name], fixed, rtol=1e-5, atol=1e-7)  # what ends near 0 is a sum of 0.1s
    assert not np.allclose(ends["small"], ends["large"])


@pytest.mark.parametrize("name", ["dpm_solver_multistep", "unipc", "heun"])
def test_samples_of_a_mixture_are_spread_as_the_data(name, mixture):
    means, std, count = mixture.means, mixture.std, 4000
    grid = continuous_grid(VP, 60, "log_snr", time_min=1e-3)
    x = np.random.default_rng(0).standard_normal((count, 2))
    end = _run(PLANS[name](grid), mixture.denoiser(VP), x)
    distance = np.linalg.norm(end[:, None] - means, axis=-1)
    share = np.bincount(distance.argmin(1), minlength=8) / count
    assert np.abs(share - 1 / 8).max() < 4 * (1 / 8 * 7 / 8 / count) ** 0.5
    # Squared distance from the mode: a chi-squared of two degrees, of mean 2 std^2 and the same deviation.
    nearest = np.square(distance.min(1))
    assert abs(nearest.mean() - 2 * std**2) < 4 * 2 * std**2 / count**0.5 + 0.002


def test_noise_is_the_examples_own():
    plan = solvers.euler_ancestral(discrete_grid(DiscreteSchedule(), 5))
    keys = jax.random.split(jax.random.key(3), 4)
    x = jnp.zeros((4, 2))
    together = _run(plan, lambda x, t: 0.5 * x, x, keys)
    alone = _run(plan, lambda x, t: 0.5 * x, x[:1], keys[2:3])
    np.testing.assert_allclose(together[2], alone[0], rtol=1e-6)
    assert len(np.unique(together)) == together.size


def test_a_state_may_be_a_tree(gaussian):
    grid = continuous_grid(VP, 8, "log_snr", time_min=1e-3)
    x = {"image": jnp.linspace(-1, 1, 6).reshape(2, 3), "text": jnp.linspace(-2, 2, 4).reshape(2, 2)}
    denoise = gaussian.denoiser(VP)

    def both(x, t):
        return jax.tree.map(lambda leaf: denoise(leaf, t), x)

    end = jax.jit(lambda x: solve(solvers.unipc(grid), both, x).x)(x)
    for name, leaf in x.items():
        np.testing.assert_allclose(end[name], _run(solvers.unipc(grid), denoise, leaf), rtol=1e-6)


def test_a_trajectory_has_what_the_network_saw_and_said(gaussian):
    grid = continuous_grid(VP, 6, "log_snr", time_min=1e-3)
    x = jnp.linspace(-1, 1, 3)
    solution = solve(solvers.ddim(grid), gaussian.denoiser(VP), x, trajectory=True)
    assert solution.states.shape == solution.estimates.shape == (6, 3)
    np.testing.assert_allclose(solution.states[0], x)
    said = gaussian.denoiser(VP)(solution.states[3], jnp.asarray(grid.t[3], jnp.float32))
    np.testing.assert_allclose(solution.estimates[3], said, rtol=1e-5)


GRID = discrete_grid(DiscreteSchedule(), 6)


@pytest.mark.parametrize("name", ["heun", "plms", "unipc_3", "ddpm"])
def test_steps_in_parts_end_where_all_of_them_do(gaussian, name):
    grid = continuous_grid(VP, 7, "log_snr", time_min=1e-3)
    plan = PLANS[name](grid) if name in PLANS else solvers.ddpm(GRID)
    denoise, x = gaussian.denoiser(VP), jnp.linspace(-1, 1, 6).reshape(2, 3)
    noise = per_example_noise(jax.random.split(jax.random.key(0), 2), x)
    part = jax.jit(lambda progress, first, stop: advance(plan, denoise, progress, first, stop, noise))
    progress = begin(plan, x, noise)
    for first in range(0, plan.evaluations, 4):
        progress = part(progress, first, min(first + 4, plan.evaluations))
    assert part._cache_size() == 1
    np.testing.assert_allclose(progress[0], jax.jit(lambda x: solve(plan, denoise, x, noise).x)(x), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.ddpm(GRID, "fixed"), "unknown variance 'fixed'; choose one of small"),
        (lambda: solvers.dpm_solver_singlestep(GRID, (3, 2)), "must add up to the 6 steps"),
        (lambda: solvers.dpm_solver_singlestep(GRID, (3, 3)), "its order must be 1"),
        (lambda: solvers.unipc(GRID, 0), "order=0 is impossible"),
        *((lambda eta=eta: solvers.ddim(GRID, eta), "eta=.* is impossible") for eta in (1.5, -0.5, np.inf, np.nan)),
        (lambda: make_plan(DiscreteSchedule(), "ddpm", 5, eta=np.nan), "eta=nan belongs to the sampler ddim"),
        (lambda: dataclasses.replace(solvers.ddim(GRID), noise=np.full(6, np.nan)), "noise is not finite"),
        (lambda: dataclasses.replace(solvers.ddim(GRID), state=np.full(6, 1e39)), "state is not finite in float32"),
        (lambda: solvers.heun(GRID, churn=1.0), "needs alpha = 1 and t = sigma, as in schedule edm"),
        (lambda: make_plan(EDMSchedule(), "euler", 5, churn=1.0), "churn=1.0 belongs to the sampler heun"),
        (lambda: make_plan(EDMSchedule(), "heun", 5, churn=-1.0), "churn=-1.0 is impossible"),
        (lambda: make_plan(FlowSchedule(), "euler", 5, spacing="karras"), "the first time is noise alone"),
        (lambda: solve(solvers.ddpm(GRID), lambda x, t: x, jnp.zeros(2)), "draws noise; give it noise="),
    ],
)
def test_an_impossible_sampler_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fast_orders_spend_every_call():
    assert [solvers.fast_orders(num) for num in (1, 2, 3, 4, 6, 50)] == [
        (1,),
        (2,),
        (2, 1),
        (3, 1),
        (3, 2, 1),
        (*(3,) * 16, 2),
    ]
