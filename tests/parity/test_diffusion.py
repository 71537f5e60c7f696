"""Schedules, times, and whole trajectories of samplers beside those of diffusers, with an exact denoiser."""

import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion import solvers
from diffusion.plan import solve
from diffusion.process import Process
from diffusion.schedule import DiscreteSchedule, EDMSchedule, create_schedule
from diffusion.solver_choice import SOLVERS
from diffusion.times import continuous_grid, discrete_grid
from weights.formats.diffusers_scheduler import SAMPLERS, _table, read_scheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = DiscreteSchedule("scaled_linear", start=0.00085, end=0.012)
MEANS, VARIANCE = np.linspace(-1, 1, 8), 0.25  # of the data, a Gaussian in each of eight components
START = np.linspace(2, -2, 8)
STEPS = (1, 5, 10, 13, 50)
SPACINGS = ("leading", "linspace", "trailing")
# Where both have the same times: ours are others if "leading" does not divide the chain, and for a single step, which
# is given the noise of the chain's end and begins there.
TIMES = [("leading", steps) for steps in (5, 10, 50)]
TIMES += [("linspace", steps) for steps in (5, 10, 13, 50)] + [("trailing", steps) for steps in STEPS]
INTERVALS = [("leading", steps) for steps in (4, 9, 49)]
INTERVALS += [(spacing, steps) for spacing in ("linspace", "trailing") for steps in STEPS]


def _data(x, t):
    """E[x_0 | x_t]."""
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    return (alpha * VARIANCE * x + sigma**2 * MEANS) / (alpha**2 * VARIANCE + sigma**2)


def _theirs(scheduler, steps):
    """The times, noise levels and end of a trajectory."""
    scheduler.set_timesteps(steps)
    x = torch.tensor(START).reshape(1, 1, 1, 8)
    if hasattr(scheduler, "sigmas"):
        x = x * scheduler.init_noise_sigma
    times = []
    for t in scheduler.timesteps:
        seen, time = scheduler.scale_model_input(x, t).numpy(), np.asarray(float(t))
        eps = (seen - SCHEDULE.alpha(time) * _data(seen, time)) / SCHEDULE.sigma(time)
        x = scheduler.step(torch.tensor(eps), t, x).prev_sample
        times.append(float(t))
    return np.array(times), x.numpy().ravel()


def _sigmas(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.numpy()


def _ours(plan, start=START):
    return np.asarray(jax.jit(lambda x: solve(plan, _data, x).x)(jnp.asarray(start, jnp.float32)))


def _compare(scheduler, steps, plan, unscaled=False):
    times, end = _theirs(scheduler, steps)
    start = START * float(scheduler.init_noise_sigma) * plan.alpha[0] if unscaled else START
    np.testing.assert_allclose(plan.t, times[: len(plan.t)], atol=1e-4)
    np.testing.assert_allclose(_ours(plan, start), end, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "start", "end"),
    [("linear", 1e-4, 2e-2), ("scaled_linear", 0.00085, 0.012), ("cosine", 1e-4, 2e-2)],
)
@pytest.mark.parametrize("zero", [False, True])
def test_alpha_bar(kind, start, end, zero):
    name = {"cosine": "squaredcos_cap_v2"}.get(kind, kind)
    reference = diffusers.DDIMScheduler(
        beta_start=start, beta_end=end, beta_schedule=name, rescale_betas_zero_snr=zero
    ).alphas_cumprod.numpy()
    alpha_bar = DiscreteSchedule(kind, start=start, end=end, zero_terminal_snr=zero).alpha_bar
    np.testing.assert_allclose(alpha_bar, reference, atol=1e-6)


@pytest.mark.parametrize(("spacing", "steps"), [*TIMES, *((spacing, 1000) for spacing in SPACINGS)])
def test_times_are_diffusers(spacing, steps):
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(discrete_grid(SCHEDULE, steps, spacing).t[:-1], scheduler.timesteps.numpy())


@pytest.mark.parametrize(("spacing", "steps"), INTERVALS)
def test_intervals_are_diffusers(spacing, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = discrete_grid(SCHEDULE, steps, spacing, intervals=True)
    np.testing.assert_array_equal(grid.t[:-1], scheduler.timesteps.numpy())
    np.testing.assert_allclose(grid.noise, scheduler.sigmas.numpy(), rtol=1e-5)


@pytest.mark.parametrize("steps", [5, 10, 20, 50, 1000])
def test_ddim(steps):
    # With leading times alone: elsewhere diffusers steps by 1000 // steps, which is not where the next time lies.
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    _compare(scheduler, steps, solvers.ddim(discrete_grid(SCHEDULE, steps)))


def test_ddim_of_stable_diffusion_ends_at_the_first_noise():
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    _compare(scheduler, 50, solvers.ddim(discrete_grid(SCHEDULE, 50, offset=1, end="first")))


@pytest.mark.parametrize("steps", [5, 10, 20, 50, 1000])
def test_plms(steps):
    # Leading times, as for DDIM. With time 0 among them diffusers asks the network there and stays where it is.
    scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True)
    _compare(scheduler, steps, solvers.plms(discrete_grid(SCHEDULE, steps, end="first")))


def test_plms_of_stable_diffusion():
    scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    plan = solvers.plms(discrete_grid(SCHEDULE, 50, offset=1, end="first"))
    assert plan.evaluations == 51
    _compare(scheduler, 50, plan)


@pytest.mark.parametrize(("spacing", "steps"), [*TIMES, *((spacing, 1000) for spacing in SPACINGS)])
@pytest.mark.parametrize(
    ("name", "make"), [("EulerDiscreteScheduler", solvers.euler), ("HeunDiscreteScheduler", solvers.heun)]
)
def test_euler_and_heun(name, make, spacing, steps):
    scheduler = getattr(diffusers, name)(**BETAS, timestep_spacing=spacing)
    _compare(scheduler, steps, make(discrete_grid(SCHEDULE, steps, spacing, whole=False)), unscaled=True)


def test_euler_with_karras_noise():
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    # Its times lie between those of the chain, where diffusers interpolates the noise level for one purpose and its
    # logarithm for another.
    plan = solvers.euler(discrete_grid(SCHEDULE, 10, "karras"))
    np.testing.assert_allclose(plan.sigma / plan.alpha, _sigmas(scheduler, 10)[:-1], rtol=5e-5)
    times, _ = _theirs(scheduler, 10)
    np.testing.assert_allclose(plan.t, times, atol=0.01)


@pytest.mark.parametrize(("spacing", "steps"), INTERVALS)
def test_dpm_solver_multistep(spacing, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, timestep_spacing=spacing)
    _compare(scheduler, steps, solvers.dpm_solver_multistep(discrete_grid(SCHEDULE, steps, spacing, intervals=True)))


@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_singlestep(steps):
    scheduler = diffusers.DPMSolverSinglestepScheduler(**BETAS, solver_order=3, lower_order_final=True)
    scheduler.set_timesteps(steps)
    stages = scheduler.order_list  # of each network call, its stage in a step
    orders = [stage for stage, after in zip(stages, [*stages[1:], 1], strict=True) if after == 1]
    grid = discrete_grid(SCHEDULE, steps, "linspace", intervals=True)
    _compare(scheduler, steps, solvers.dpm_solver_singlestep(grid, orders, midpoint=True))


@pytest.mark.parametrize(("spacing", "steps"), INTERVALS)
@pytest.mark.parametrize("order", [2, 3])
def test_unipc(order, spacing, steps):
    scheduler = diffusers.UniPCMultistepScheduler(
        **BETAS, timestep_spacing=spacing, solver_order=order, final_sigmas_type="zero"
    )
    _compare(scheduler, steps, solvers.unipc(discrete_grid(SCHEDULE, steps, spacing, intervals=True), order))


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ancestral_steps(spacing, variance):
    """Means and deviations of single steps: the noise of two libraries cannot be the same."""
    kind = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False, variance_type=kind, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    plan = solvers.ddpm(discrete_grid(SCHEDULE, 10, spacing), variance)
    # After its last step diffusers leaves noise of the larger variance in the sample, unless that step is from time 0.
    steps = scheduler.timesteps if variance == "small" or scheduler.timesteps[-1] == 0 else scheduler.timesteps[:-1]
    for i, t in enumerate(steps):
        time = np.asarray(float(t))
        estimate = _data(START, time)
        eps = (START - SCHEDULE.alpha(time) * estimate) / SCHEDULE.sigma(time)
        output = torch.tensor(eps).reshape(1, 1, 1, 8)
        if variance == "learned":
            output = torch.cat([output, torch.full_like(output, 0.4)], dim=1)
        x = torch.tensor(START).reshape(1, 1, 1, 8)
        drawn = [scheduler.step(output, t, x, generator=torch.Generator().manual_seed(7)).prev_sample for _ in range(2)]
        assert torch.equal(*drawn)
        noise = torch.randn((1, 1, 1, 8), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        scale = plan.noise[i]
        if plan.log_variance is not None:
            scale *= np.exp((0.7 * plan.log_variance[i, 1] + 0.3 * plan.log_variance[i, 0]) / 2)
        expected = plan.state[i] * START + plan.model[i, 0] * estimate + scale * noise.numpy().ravel()
        np.testing.assert_allclose(expected, drawn[0].numpy().ravel(), atol=1e-4)


def test_euler_ancestral_steps():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(10)
    plan = solvers.euler_ancestral(discrete_grid(SCHEDULE, 10, "linspace", whole=False))
    for i, t in enumerate(scheduler.timesteps):
        x = torch.tensor(START).reshape(1, 1, 1, 8) * scheduler.init_noise_sigma
        seen = scheduler.scale_model_input(x, t).numpy().ravel()
        estimate = _data(seen, np.asarray(float(t)))
        eps = (seen - plan.alpha[i] * estimate) / plan.sigma[i]
        stepped = scheduler.step(
            torch.tensor(eps).reshape(1, 1, 1, 8), t, x, generator=torch.Generator().manual_seed(7)
        ).prev_sample
        noise = torch.randn((1, 1, 1, 8), generator=torch.Generator().manual_seed(7), dtype=torch.float64).numpy()
        after = plan.alpha[i + 1] if i < 9 else 1.0
        ours = (plan.state[i] * seen + plan.model[i, 0] * estimate + plan.noise[i] * noise.ravel()) / after
        np.testing.assert_allclose(ours, stepped.numpy().ravel(), atol=1e-3, rtol=1e-4)


def test_edm_s_preconditioning_and_times():
    scheduler, process = diffusers.EDMEulerScheduler(sigma_data=0.5), Process(EDMSchedule(), "edm", sigma_data=0.5)
    scheduler.set_timesteps(18)
    grid = continuous_grid(EDMSchedule(), 18, "karras", clean=True)
    np.testing.assert_allclose(grid.sigma, scheduler.sigmas.numpy(), rtol=1e-5)
    x, output = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    for sigma in (0.002, 0.5, 80.0):
        t = jnp.full(3, sigma)
        seen = scheduler.precondition_inputs(torch.from_numpy(x), torch.tensor(sigma)).numpy()
        np.testing.assert_allclose(process.network_input(jnp.asarray(x), t), seen, rtol=1e-5)
        data = scheduler.precondition_outputs(torch.from_numpy(x), torch.from_numpy(output), torch.tensor(sigma))
        np.testing.assert_allclose(process.data(jnp.asarray(output), jnp.asarray(x), t), data.numpy(), atol=1e-5)
        np.testing.assert_allclose(process.network_time(t), float(scheduler.precondition_noise(sigma)), rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(SAMPLERS))
@pytest.mark.parametrize("settings", [{}, {**BETAS, "prediction_type": "v_prediction"}], ids=["default", "v"])
def test_schedulers_are_read(kind, settings, tmp_path):
    scheduler = getattr(diffusers, kind)(**settings)
    scheduler.save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    process, sampling = read_scheduler(config)
    process = Process(create_schedule(**process.pop("schedule")), **process)
    assert isinstance(process.schedule, DiscreteSchedule)
    np.testing.assert_allclose(process.schedule.alpha_bar, scheduler.alphas_cumprod.numpy(), atol=1e-6)
    assert process.prediction == ("v" if settings else "eps")
    assert process.clip == config.get("clip_sample", False)
    assert sampling["sampler"] in SOLVERS and config["_class_name"] == kind
    assert set(_table(kind)) == set(inspect.signature(type(scheduler).__init__).parameters) - {"self"}
