"""Solvers by the names that samplers are published under, each on its own times unless told otherwise."""

from collections.abc import Callable

from diffusion import solvers
from diffusion.plan import Plan
from diffusion.schedule import DiscreteSchedule, FlowSchedule, Schedule
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
)

TIME_MIN = 1e-3  # where samplers of the SDEs stop, as published (Lu et al. 2022a, section 4.2)

_OF_INTERVALS = ("dpm_solver_multistep", "dpm_solver_singlestep", "unipc")
_BETWEEN_STEPS = ("euler", "euler_ancestral", "heun")

_PLANS: dict[str, Callable[[TimeGrid], Plan]] = {
    "plms": solvers.plms,
    "euler": solvers.euler,
    "euler_ancestral": solvers.euler_ancestral,
    "dpm_solver_multistep": solvers.dpm_solver_multistep,
    "unipc": solvers.unipc,
}


def make_plan(
    schedule: Schedule, sampler: str, steps: int, *, spacing: str = "", eta: float = 0.0, variance: str = "small"
) -> Plan:
    """The plan of a sampler.

    Args:
      schedule: that the network was trained on.
      sampler: one of `SOLVERS`.
      steps: S; the network is asked once a step, by "heun" twice.
      spacing: of `diffusion.times`; "" for the sampler's own: of a chain "linspace" for DPM-Solver, UniPC, Euler and
        Heun, and "leading" for the others; in continuous time "log_snr", for the singlestep solver, the reverse SDE and
        flow "time".
      eta: of "ddim".
      variance: of "ddpm".

    Raises:
      ValueError: if there is no such sampler or spacing, or the steps are impossible.
    """
    if sampler not in SOLVERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(SOLVERS)}")
    if eta != 0 and sampler != "ddim":
        raise ValueError(f"eta={eta} belongs to the sampler ddim, not to {sampler}")
    if isinstance(schedule, DiscreteSchedule):
        if sampler == "reverse_sde":
            raise ValueError("sampler 'reverse_sde' needs a schedule in continuous time; ddpm is that of a chain")
        usual = "linspace" if sampler in (*_OF_INTERVALS, *_BETWEEN_STEPS) else "leading"
        grid = discrete_grid(
            schedule,
            steps,
            spacing or usual,
            intervals=sampler in _OF_INTERVALS,
            whole=sampler not in _BETWEEN_STEPS,
        )
    else:
        by_time = sampler in ("dpm_solver_singlestep", "reverse_sde") or isinstance(schedule, FlowSchedule)
        first = None if isinstance(schedule, FlowSchedule) else max(TIME_MIN, schedule.time_range[0])
        grid = continuous_grid(schedule, steps, spacing or ("time" if by_time else "log_snr"), time_min=first)
        if sampler == "reverse_sde":
            return solvers.reverse_sde(grid, schedule)
    if sampler == "ddpm":
        return solvers.ddpm(grid, variance)
    if sampler == "ddim":
        return solvers.ddim(grid, eta)
    if sampler == "dpm_solver_singlestep":
        return solvers.dpm_solver_singlestep(grid, _orders(grid))
    if sampler == "heun":
        return solvers.heun(grid, straight=isinstance(schedule, FlowSchedule))
    return _PLANS[sampler](grid)


def _orders(grid: TimeGrid) -> tuple[int, ...]:
    """DPM-Solver-fast's orders; steps from noise alone or to clean data are infinite in lambda, so of order 1."""
    first, last = int(grid.alpha[0] == 0), int(grid.sigma[-1] == 0)
    if len(grid) <= first + last:
        return (1,) * len(grid)
    return (1,) * first + solvers.fast_orders(len(grid) - first - last) + (1,) * last
