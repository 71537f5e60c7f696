"""The times at which a sampler asks the network, and the noise there.

Published samplers of a discrete chain choose their times in two ways: `num` times, from the last of which the sampler
steps to clean data (DDPM, DDIM, PLMS, Euler, Heun), or `num` intervals between the last time and the first, the first
itself left out (DPM-Solver, UniPC). `intervals` tells which.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from diffusion.schedule import DiscreteSchedule, Schedule

SPACINGS = ("leading", "linspace", "trailing", "karras")
CONTINUOUS_SPACINGS = ("time", "log_snr", "karras")
RHO = 7.0  # of Karras et al. 2022


@dataclasses.dataclass(frozen=True, eq=False)
class TimeGrid:
    """Times of a sampler, from noise to data.

    Attributes:
      t: [S + 1], in the schedule's units; at the last the network is never asked.
      alpha: [S + 1], factor of the data.
      sigma: [S + 1], standard deviation of the noise; the last is 0 where sampling ends in clean data.
    """

    t: Float[np.ndarray, " s"]
    alpha: Float[np.ndarray, " s"]
    sigma: Float[np.ndarray, " s"]

    def __post_init__(self) -> None:
        if not all(np.all(np.isfinite(values)) for values in (self.t, self.alpha, self.sigma)):
            raise ValueError("times or noise levels are not finite; check the numbers of the schedule")
        noise = self.noise
        if len(self.t) < 2 or np.any(self.sigma < 0) or not np.all(noise[1:] < noise[:-1]):
            raise ValueError("a sampler needs at least one step, and less noise after each of them")

    def __len__(self) -> int:
        """The number of steps S."""
        return len(self.t) - 1

    def last(self, num: int) -> "TimeGrid":
        """The grid of its last `num` steps."""
        return TimeGrid(self.t[-num - 1 :], self.alpha[-num - 1 :], self.sigma[-num - 1 :])

    @property
    def noise(self) -> Float[np.ndarray, " s"]:
        """Sigma / alpha."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    @property
    def log_snr(self) -> Float[np.ndarray, " s"]:
        """Lambda = ln(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite for clean data."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)


def timesteps(
    spacing: str,
    num: int,
    total: int,
    *,
    intervals: bool = False,
    offset: int = 0,
    whole: bool = True,
    published: bool = False,
) -> np.ndarray:
    """Times of a chain, falling (Lin et al. 2023, table 2).

    Args:
      spacing: "leading", multiples of total / num from 0, or of total / (num + 1) from the first one above 0 for
        intervals, rounded down; "linspace", from total - 1 to 0; "trailing", from total - 1 in steps of total / num.
        One step begins at total - 1 whatever the spacing, as there it would hand the noise back elsewhere.
      num: S, the number of them.
      total: T of the chain.
      intervals: see the module; "trailing" is the same for both.
      offset: added to leading ones; 1 in Stable Diffusion.
      whole: round "linspace" to steps of the chain, as all published samplers but Euler's and Heun's do.
      published: as published code has them: multiples of total // num, so that where num does not divide total the
        chain begins too late for the noise that it is given, at 501 steps of 1000 in the middle; and one step is the
        chain's first. Where num divides total, and is more than 1, both are the same.

    Returns:
      [S] float64 in 0 ... T - 1. Where rounding repeats a time it stands once, so that there are
      fewer: a step that goes nowhere asks the network for nothing.

    Raises:
      ValueError: if there is no such spacing, or not as many times.
    """
    most = total - (intervals and spacing != "trailing")
    if most < 1:
        raise ValueError("a chain of one step has no interval; choose spacing 'trailing' or a sampler such as ddim")
    if not 1 <= num <= most:
        raise ValueError(f"{num} steps are not between 1 and {most}, all that a chain of {total} has for this sampler")
    if spacing == "leading":
        points = num + intervals
        times = np.arange(int(intervals), points)
        times = (times * (total // points) if published else times * total // points) + offset
    elif spacing == "linspace":
        # numpy rounds halves to even, as the reference implementations do.
        times = np.linspace(0, total - 1, num + intervals)[int(intervals) :]
        times = np.round(times) if whole else times
    elif spacing == "trailing":
        times = np.round(total - np.arange(num)[::-1] * (total / num)) - 1
    else:
        raise ValueError(f"unknown spacing {spacing!r}; choose one of {', '.join(SPACINGS)}, time, log_snr")
    times = times if num > 1 or published else np.array([total - 1])
    return np.unique(np.minimum(times, total - 1))[::-1].astype(np.float64)


def karras_noise(noise_max: float, noise_min: float, num: int, rho: float = RHO) -> Float[np.ndarray, "{num}"]:
    """Noise levels that fall ever slower (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0, 1, num)
    low, high = noise_min ** (1 / rho), noise_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def discrete_grid(
    schedule: DiscreteSchedule,
    num: int,
    spacing: str = "leading",
    *,
    intervals: bool = False,
    offset: int = 0,
    whole: bool = True,
    end: str = "clean",
    published: bool = False,
) -> TimeGrid:
    """Times of a chain.

    Args:
      schedule: of the chain.
      num: S.
      spacing: see `timesteps`; or "karras", noise levels of `karras_noise` between the last time's and the first's.
      intervals: see the module.
      offset: see `timesteps`.
      whole: see `timesteps`.
      end: "clean", the last step ends in data without noise; "first", at the noise of time 0, as PLMS and DDIM do in
        Stable Diffusion. Then time 0 itself is the end, and not a step.
      published: see `timesteps`.

    Raises:
      ValueError: on an unknown spacing or end, or an impossible number of steps.
    """
    if end not in ("clean", "first"):
        raise ValueError(f"unknown end {end!r}; choose clean or first")
    if spacing == "karras":
        if num < 1:
            raise ValueError(f"{num} steps are too few; choose at least 1")
        noise = schedule.noise_to_signal
        if not math.isfinite(noise[-1]):
            raise ValueError("spacing 'karras' needs a finite noise level, and zero terminal SNR has none")
        levels = karras_noise(noise[-1], noise[0], num)
        alpha = 1 / np.sqrt(1 + np.square(levels))
        times, sigma = schedule.time_of_noise(levels), levels * alpha
    else:
        choices = {"intervals": intervals, "offset": offset, "whole": whole, "published": published}
        times = timesteps(spacing, num, schedule.steps, **choices)
        if end == "first" and times[-1] == 0:
            times = times[:-1]
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    final = (1.0, 0.0) if end == "clean" else (float(schedule.alpha(0.0)), float(schedule.sigma(0.0)))
    return TimeGrid(np.append(times, 0.0), np.append(alpha, final[0]), np.append(sigma, final[1]))


def continuous_grid(
    schedule: Schedule,
    num: int,
    spacing: str = "time",
    *,
    time_min: float | None = None,
    time_max: float | None = None,
    clean: bool = False,
) -> TimeGrid:
    """Times of a schedule in continuous time; a chain's are taken between its steps.

    Args:
      schedule: any.
      num: S.
      spacing: "time", evenly; "log_snr", evenly in lambda; "karras", see `karras_noise`.
      time_min: the last time; the schedule's first one if None.
      time_max: the first time; the schedule's last one if None.
      clean: after the last time, step to data without noise: S includes this step.

    Raises:
      ValueError: on an unknown spacing, or an impossible number of steps.
    """
    points = num if clean else num + 1
    if points < 2 and not clean or points < 1:
        raise ValueError(f"{num} steps are too few; choose at least 1")
    first, last = schedule.time_range
    low, high = (first if time_min is None else time_min), (last if time_max is None else time_max)
    if not first <= low < high <= last:
        raise ValueError(f"times {low} to {high} do not lie in the schedule's, {first} to {last}")
    if spacing == "time":
        times = np.linspace(high, low, points)
    elif spacing in ("log_snr", "karras"):
        ends = np.array([high, low])
        with np.errstate(divide="ignore"):
            noise_max, noise_min = schedule.sigma(ends) / schedule.alpha(ends)
        if not math.isfinite(noise_max):
            raise ValueError(f"spacing {spacing!r} needs a finite noise level, and the first time is noise alone")
        levels = np.geomspace(noise_max, noise_min, points) if spacing == "log_snr" else None
        levels = karras_noise(noise_max, noise_min, points) if levels is None else levels
        times = np.clip(schedule.time_of_noise(levels), low, high)
    else:
        raise ValueError(f"unknown spacing {spacing!r}; choose one of {', '.join(CONTINUOUS_SPACINGS)}")
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    if clean:
        times, alpha, sigma = np.append(times, 0.0), np.append(alpha, 1.0), np.append(sigma, 0.0)
    return TimeGrid(times, alpha, sigma)
