"""Solvers by the names that samplers are published under, each on its own times unless told otherwise."""

import dataclasses
import math
from collections.abc import Callable

from diffusion import solvers
from diffusion.plan import Plan
from diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, Schedule, require
from diffusion.times import TimeGrid, continuous_grid, discrete_grid

SOLVERS = (
    "ddpm",
    "ddim",
    "plms",
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_solver_multistep",
    "dpm_solver_singlestep",
    "unipc",
    "reverse_sde",
    "flow_sde",
)

LAST_STEP = 0.04  # of flow_sde, to the data (Ma et al. 2024, the authors' code)
TIME_MIN = 1e-3  # where samplers of the SDEs stop, as published (Lu et al. 2022a, section 4.2)

_OF_INTERVALS = ("dpm_solver_multistep", "dpm_solver_singlestep", "unipc")
_BETWEEN_STEPS = ("euler", "euler_ancestral", "heun")
TIMES = ("even", "published")
ENDS = ("clean", "first")
_ENDS_AT_FIRST = ("ddim", "plms")

_PLANS: dict[str, Callable[[TimeGrid], Plan]] = {
    "plms": solvers.plms,
    "euler": solvers.euler,
    "euler_ancestral": solvers.euler_ancestral,
    "dpm_solver_multistep": solvers.dpm_solver_multistep,
    "unipc": solvers.unipc,
}


def make_plan(
    schedule: Schedule,
    sampler: str,
    steps: int,
    *,
    spacing: str = "",
    eta: float = 0.0,
    variance: str = "small",
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = 0.0,
    churn_noise: float = 1.0,
    strength: float = 1.0,
    times: str = "even",
    offset: int = 0,
    end: str = "clean",
) -> Plan:
    """The plan of a sampler.

    Args:
      schedule: that the network was trained on.
      sampler: one of `SOLVERS`.
      steps: S; the network is asked once a step, by "heun" twice.
      spacing: of `diffusion.times`; "" for the sampler's own: of a chain "linspace" for DPM-Solver, UniPC, Euler and
        Heun, and "leading" for the others; of noise levels (EDM) "karras"; in other continuous time "log_snr", for the
        singlestep solver, the SDEs and flow "time". A chain's times may be between its steps, "time" or "log_snr".
      eta: of "ddim".
      variance: of "ddpm".
      churn: of "heun", with the three that follow: S_churn of Karras et al. 2022, algorithm 2.
      churn_min: S_min.
      churn_max: S_max; 0 for no end.
      churn_noise: S_noise.
      strength: share of the steps that are made, the last ones, rounded up: what begins between noise and data, as in
        SDEdit (Meng et al. 2022, section 3).
      times: of a chain: "even", or "published", as the code of Stable Diffusion has them (`diffusion.times.timesteps`);
        then Euler's and Heun's method begin with noise of the chain's sigma, too, and not of variance 1.
      offset: of a chain: added to times whose spacing is "leading"; 1 in Stable Diffusion.
      end: of a chain: "first" lets "ddim" and "plms" end at the noise of the chain's first step, as in Stable
        Diffusion; other samplers, and "clean", end in data.

    Raises:
      ValueError: if there is no such sampler or spacing, or the steps are impossible.
    """
    if sampler not in SOLVERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(SOLVERS)}")
    if eta != 0 and sampler != "ddim":
        raise ValueError(f"eta={eta} belongs to the sampler ddim, not to {sampler}")
    churns = {"churn": churn, "churn_min": churn_min, "churn_max": churn_max, "churn_noise": churn_noise}
    for name, value in churns.items():
        require(name, value, lambda number: number >= 0, "at least 0")
        if sampler != "heun" and value != (1.0 if name == "churn_noise" else 0.0):
            raise ValueError(f"{name}={value} belongs to the sampler heun, not to {sampler}")
    if sampler == "flow_sde" and not isinstance(schedule, FlowSchedule):
        raise ValueError("sampler 'flow_sde' needs schedule flow")
    require("strength", strength, lambda share: 0 < share <= 1, "above 0 and at most 1")
    chain = {"times": (times, TIMES), "end": (end, ENDS)}
    for name, (value, choices) in chain.items():
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
    require("offset", offset, lambda n: n >= 0 and isinstance(n, int), "a whole number of at least 0")
    if not isinstance(schedule, DiscreteSchedule) and (times, offset, end) != ("even", 0, "clean"):
        raise ValueError("times, offset and end are of a chain's steps; leave them out, or choose schedule discrete")
    published = times == "published"
    grid = _grid(schedule, sampler, steps, spacing, published, offset, end)
    total = len(grid)
    grid = grid.last(max(1, math.ceil(strength * total - 1e-9)))
    if sampler == "flow_sde":
        return solvers.flow_sde(grid)
    if sampler == "reverse_sde" and not isinstance(schedule, DiscreteSchedule):
        return solvers.reverse_sde(grid, schedule)
    if sampler == "ddpm":
        return solvers.ddpm(grid, variance)
    if sampler == "ddim":
        return solvers.ddim(grid, eta)
    if sampler == "dpm_solver_singlestep":
        return solvers.dpm_solver_singlestep(grid, _orders(grid))
    if sampler == "heun":
        straight = isinstance(schedule, FlowSchedule)
        within = (churn_min, churn_max or math.inf)
        plan = solvers.heun(grid, churn, within, churn_noise, straight=straight, total=total)
    else:
        plan = _PLANS[sampler](grid)
    if published and sampler in _BETWEEN_STEPS and spacing != "leading":
        return dataclasses.replace(plan, start_scale=plan.first_sigma)
    return plan


def _grid(
    schedule: Schedule, sampler: str, steps: int, spacing: str, published: bool, offset: int, end: str
) -> TimeGrid:
    """The times of a sampler."""
    if isinstance(schedule, DiscreteSchedule):
        if sampler == "reverse_sde":
            raise ValueError("sampler 'reverse_sde' needs a schedule in continuous time; ddpm is that of a chain")
        if spacing in ("time", "log_snr"):
            # As with a chain's own spacings, the last step is to clean data; DPM-Solver-fast ends at the first time.
            return continuous_grid(schedule, steps, spacing, clean=sampler != "dpm_solver_singlestep")
        usual = "linspace" if sampler in (*_OF_INTERVALS, *_BETWEEN_STEPS) else "leading"
        return discrete_grid(
            schedule,
            steps,
            spacing or usual,
            intervals=sampler in _OF_INTERVALS,
            whole=sampler not in _BETWEEN_STEPS,
            offset=offset,
            end=end if sampler in _ENDS_AT_FIRST else "clean",
            published=published,
        )
    if isinstance(schedule, EDMSchedule):
        return continuous_grid(schedule, steps, spacing or "karras", clean=sampler != "reverse_sde")
    if sampler == "flow_sde" and not spacing and steps > 1:
        return continuous_grid(schedule, steps, time_min=max(LAST_STEP, schedule.time_range[0]), clean=True)
    by_time = sampler in ("dpm_solver_singlestep", "reverse_sde", "flow_sde") or isinstance(schedule, FlowSchedule)
    first = None if isinstance(schedule, FlowSchedule) else max(TIME_MIN, schedule.time_range[0])
    return continuous_grid(schedule, steps, spacing or ("time" if by_time else "log_snr"), time_min=first)


def _orders(grid: TimeGrid) -> tuple[int, ...]:
    """DPM-Solver-fast's orders; steps from noise alone or to clean data are infinite in lambda, so of order 1."""
    first, last = int(grid.alpha[0] == 0), int(grid.sigma[-1] == 0)
    if len(grid) <= first + last:
        return (1,) * len(grid)
    return (1,) * first + solvers.fast_orders(len(grid) - first - last) + (1,) * last
