"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, in discrete steps or in continuous time.

A schedule is a small frozen dataclass, so that it can be a static argument of a compiled function. Its tables are
float64 in numpy; functions of a time that is a JAX array return float32 in JAX.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

Times = Any  # float, float64 [n] in numpy, or a JAX array of any shape

BETAS = ("linear", "scaled_linear", "cosine", "sohl_dickstein")

_LEAST_SIGNAL = 1e-18  # of alpha: less is lost in float32, whose products the networks and solvers compute with


def require(name: str, value: Any, possible: Callable[[Any], bool], allowed: str) -> None:
    """Raises ValueError unless a number is finite and possible; names it and says what is allowed."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and possible(value)):
        raise ValueError(f"{name}={value} is impossible; it must be {allowed}")


def betas(kind: str, steps: int, start: float, end: float) -> Float[np.ndarray, " t"]:
    """The variances beta_t of a forward chain's steps.

    Args:
      kind: "linear" from start to end (Ho et al. 2020, section 4); "scaled_linear", linear in sqrt(beta), which latent
        diffusion's code calls linear (Rombach et al. 2022); "cosine" (Nichol and Dhariwal 2021, eq. 17, s = 0.008, beta
        at most 0.999), which has no ends; "sohl_dickstein", 1 / (T - t + 1), so that each step removes a constant
        fraction of the signal (Sohl-Dickstein et al. 2015, section 2.4.1), as their code has it: down to 1 / 2, no less
        than 1e-6, the first 1e-3 more.
      steps: T.
      start: beta_1.
      end: beta_T.

    Raises:
      ValueError: if there is no such kind; lists the choices.
    """
    if kind == "linear":
        return np.linspace(start, end, steps)
    if kind == "scaled_linear":
        return np.square(np.linspace(math.sqrt(start), math.sqrt(end), steps))
    if kind == "cosine":
        alpha_bar = np.square(np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * math.pi / 2))
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    if kind == "sohl_dickstein":
        floor = np.full(steps, 1e-6)
        floor[0] += 1e-3
        return floor + (1 - floor) / np.linspace(steps, 2, steps)
    raise ValueError(f"unknown betas {kind!r}; choose one of {', '.join(BETAS)}")


def rescale_to_zero_snr(alpha_bar: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Shifts and scales sqrt(alpha_bar) so that the last is 0 and the first stays (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(alpha_bar)
    return np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))


@dataclasses.dataclass(frozen=True)
class DiscreteSchedule:
    """A chain of T steps; time t = 0 ... T - 1 is the state after t + 1 of them, of variance 1 for unit data.

    Attributes:
      kind: see `betas`.
      steps: T.
      start: beta_1, where the kind has one.
      end: beta_T, where the kind has one.
      zero_terminal_snr: see `rescale_to_zero_snr`.

    Raises:
      ValueError: on an unknown kind, or a number that makes no such chain.
    """

    kind: str = "linear"
    steps: int = 1000
    start: float = 1e-4
    end: float = 2e-2
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        least = 2 if self.zero_terminal_snr else 1  # the first step keeps its noise
        require("steps", self.steps, lambda n: n >= least and isinstance(n, int), f"a whole number of at least {least}")
        for name in ("start", "end"):
            require(name, getattr(self, name), lambda beta: 0 < beta < 1, "a beta above 0 and below 1")
        alpha_bar = np.append(1.0, self.alpha_bar)
        if not np.all(np.diff(alpha_bar) < 0):
            raise ValueError(f"start={self.start} is impossible; it must be large enough for a step to add noise")
        if not self.zero_terminal_snr and alpha_bar[-1] < _LEAST_SIGNAL**2:
            raise ValueError(
                f"end={self.end} with {self.steps} steps is impossible; the last step must keep alpha above "
                f"{_LEAST_SIGNAL}, or be noise alone by zero_terminal_snr"
            )

    @functools.cached_property
    def alpha_bar(self) -> Float[np.ndarray, " t"]:
        """The product of 1 - beta up to each time."""
        alpha_bar = np.cumprod(1 - betas(self.kind, self.steps, self.start, self.end))
        return rescale_to_zero_snr(alpha_bar) if self.zero_terminal_snr else alpha_bar

    @functools.cached_property
    def noise_to_signal(self) -> Float[np.ndarray, " t"]:
        """Sigma / alpha at each time, the noise level of samplers that let noise grow on unscaled data."""
        with np.errstate(divide="ignore"):
            return np.sqrt(1 / self.alpha_bar - 1)

    @property
    def time_range(self) -> tuple[float, float]:
        """The first time and the last."""
        return 0.0, float(self.steps - 1)

    def alpha(self, t: Times) -> Any:
        """The factor of the data; between the steps, that of `noise_to_signal` interpolated."""
        return self._look_up(t)[0]

    def sigma(self, t: Times) -> Any:
        """The standard deviation of the noise; between the steps, that of `noise_to_signal` interpolated."""
        return self._look_up(t)[1]

    def time_of_noise(self, noise_to_signal: Times) -> np.ndarray:
        """Where sigma / alpha reaches these values, interpolated between the steps: float64."""
        return np.interp(noise_to_signal, self.noise_to_signal, np.arange(self.steps, dtype=np.float64))

    def _look_up(self, t: Times) -> tuple[Any, Any]:
        xp = _numpy(t)
        kind = xp.float32 if xp is jnp else xp.float64
        t = xp.asarray(t, kind)
        alpha, sigma, noise = (
            xp.asarray(table, kind)
            for table in (np.sqrt(self.alpha_bar), np.sqrt(1 - self.alpha_bar), np.minimum(self.noise_to_signal, 1e18))
        )
        low = xp.floor(t).astype(int)
        part = t - low
        between = noise[low] * (1 - part) + noise[xp.minimum(low + 1, self.steps - 1)] * part
        between_alpha = 1 / xp.sqrt(1 + between * between)
        whole = part == 0
        return xp.where(whole, alpha[low], between_alpha), xp.where(whole, sigma[low], between * between_alpha)


@dataclasses.dataclass(frozen=True)
class VPSchedule:
    """The variance-preserving SDE, beta(t) linear on 0 <= t <= 1 (Song et al. 2021, eq. 11 and appendix C).

    Attributes:
      beta_min: beta(0).
      beta_max: beta(1).
      time_min: where training and sampling end, as the score has no limit at 0.

    Raises:
      ValueError: on a number that makes no such process.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_min: float = 1e-5

    def __post_init__(self) -> None:
        most = -4 * math.log(_LEAST_SIGNAL)
        require("beta_min", self.beta_min, lambda beta: beta >= 0, "at least 0")
        require(
            "beta_max",
            self.beta_max,
            lambda beta: 0 < beta >= self.beta_min and self.beta_min + beta <= most,
            f"above 0, at least beta_min, and with it at most {most:.4g}, so that some signal is left at time 1",
        )
        require("time_min", self.time_min, lambda t: 0 < t < 1, "above 0 and below 1")

    @property
    def time_range(self) -> tuple[float, float]:
        """The first time and the last."""
        return self.time_min, 1.0

    def log_alpha(self, t: Times) -> Any:
        """Logarithm of alpha(t) = - integral of beta / 2."""
        return -(t * t) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Times) -> Any:
        """The factor of the data."""
        return _numpy(t).exp(self.log_alpha(t))

    def sigma(self, t: Times) -> Any:
        """The standard deviation of the noise."""
        xp = _numpy(t)
        return xp.sqrt(-xp.expm1(2 * self.log_alpha(t)))

    def time_of_noise(self, noise_to_signal: Times) -> np.ndarray:
        """Where sigma / alpha reaches these values: float64."""
        return self._time_of_log_alpha(-np.log1p(np.square(noise_to_signal)) / 2)

    def drift(self, t: Times) -> Any:
        """The factor f in dx = f x dt + g dw."""
        return -(self.beta_min + t * (self.beta_max - self.beta_min)) / 2

    def diffusion_squared(self, t: Times) -> Any:
        """The square of g in dx = f x dt + g dw."""
        return -2 * self.drift(t)

    def _time_of_log_alpha(self, log_alpha: Any) -> np.ndarray:
        slope = self.beta_max - self.beta_min
        root = np.sqrt(self.beta_min**2 - 4 * slope * log_alpha)
        return -4 * log_alpha / (root + self.beta_min)


@dataclasses.dataclass(frozen=True)
class SubVPSchedule(VPSchedule):
    """The sub-VP SDE: VP's signal with less noise, sigma = 1 - alpha^2 (Song et al. 2021, eq. 12 and appendix C)."""

    def sigma(self, t: Times) -> Any:
        """The standard deviation of the noise."""
        return -_numpy(t).expm1(2 * self.log_alpha(t))

    def time_of_noise(self, noise_to_signal: Times) -> np.ndarray:
        """Where sigma / alpha reaches these values: float64."""
        noise = np.asarray(noise_to_signal, np.float64)
        return self._time_of_log_alpha(np.log((np.sqrt(np.square(noise) + 4) - noise) / 2))

    def diffusion_squared(self, t: Times) -> Any:
        """The square of g in dx = f x dt + g dw."""
        return 2 * self.drift(t) * _numpy(t).expm1(4 * self.log_alpha(t))


@dataclasses.dataclass(frozen=True)
class VESchedule:
    """The variance-exploding SDE, sigma geometric on 0 <= t <= 1 (Song et al. 2021, eq. 9 and appendix C).

    Attributes:
      sigma_min: sigma(0).
      sigma_max: sigma(1), about the largest distance between two examples.
      time_min: where training and sampling end.

    Raises:
      ValueError: on a number that makes no such process.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    time_min: float = 1e-5

    def __post_init__(self) -> None:
        most = 1 / _LEAST_SIGNAL
        require("sigma_min", self.sigma_min, lambda sigma: sigma >= _LEAST_SIGNAL, f"at least {_LEAST_SIGNAL}")
        require(
            "sigma_max", self.sigma_max, lambda sigma: self.sigma_min < sigma <= most, f"above sigma_min, to {most:.0e}"
        )
        require("time_min", self.time_min, lambda t: 0 <= t < 1, "at least 0 and below 1")

    @property
    def time_range(self) -> tuple[float, float]:
        """The first time and the last."""
        return self.time_min, 1.0

    def alpha(self, t: Times) -> Any:
        """The factor of the data, 1."""
        return _numpy(t).ones_like(t)

    def sigma(self, t: Times) -> Any:
        """The standard deviation of the noise."""
        return self.sigma_min * _numpy(t).exp(t * math.log(self.sigma_max / self.sigma_min))

    def time_of_noise(self, noise_to_signal: Times) -> np.ndarray:
        """Where sigma / alpha reaches these values: float64."""
        return np.log(np.asarray(noise_to_signal) / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)

    def drift(self, t: Times) -> Any:
        """The factor f in dx = f x dt + g dw, 0."""
        return _numpy(t).zeros_like(t)

    def diffusion_squared(self, t: Times) -> Any:
        """The square of g in dx = f x dt + g dw."""
        return 2 * math.log(self.sigma_max / self.sigma_min) * self.sigma(t) ** 2


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow's straight line, x_t = (1 - t) x_0 + t eps (Liu et al. 2023, eq. 1, with time reversed).

    Attributes:
      time_min: where training and sampling end.
      time_max: where sampling begins; a little below 1, as alpha = 0 has no logarithm.

    Raises:
      ValueError: on a number that makes no such process.
    """

    time_min: float = 0.0
    time_max: float = 1.0

    def __post_init__(self) -> None:
        require("time_min", self.time_min, lambda t: 0 <= t < 1, "at least 0 and below 1")
        require("time_max", self.time_max, lambda t: self.time_min < t <= 1, "above time_min and at most 1")

    @property
    def time_range(self) -> tuple[float, float]:
        """The first time and the last."""
        return self.time_min, self.time_max

    def alpha(self, t: Times) -> Any:
        """The factor of the data."""
        return 1 - t

    def sigma(self, t: Times) -> Any:
        """The standard deviation of the noise."""
        return t

    def time_of_noise(self, noise_to_signal: Times) -> np.ndarray:
        """Where sigma / alpha reaches these values: float64."""
        return 1 / (1 + 1 / np.asarray(noise_to_signal, np.float64))

    def drift(self, t: Times) -> Any:
        """The factor f in dx = f x dt + g dw."""
        return -1 / (1 - t)

    def diffusion_squared(self, t: Times) -> Any:
        """The square of g in dx = f x dt + g dw."""
        return 2 * t / (1 - t)


@dataclasses.dataclass(frozen=True)
class EDMSchedule:
    """Noise on unscaled data whose time is its standard deviation, x_t = x_0 + t eps (Karras et al. 2022, section 3).

    Attributes:
      sigma_min: where sampling ends, but for the step to clean data.
      sigma_max: where it begins.

    Raises:
      ValueError: on a number that makes no such process.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require("sigma_min", self.sigma_min, lambda sigma: sigma >= _LEAST_SIGNAL, f"at least {_LEAST_SIGNAL}")
        most = 1 / _LEAST_SIGNAL
        require(
            "sigma_max", self.sigma_max, lambda sigma: self.sigma_min < sigma <= most, f"above sigma_min, to {most:.0e}"
        )

    @property
    def time_range(self) -> tuple[float, float]:
        """The first time and the last."""
        return self.sigma_min, self.sigma_max

    def alpha(self, t: Times) -> Any:
        """The factor of the data, 1."""
        return _numpy(t).ones_like(t)

    def sigma(self, t: Times) -> Any:
        """The standard deviation of the noise."""
        return t

    def time_of_noise(self, noise_to_signal: Times) -> np.ndarray:
        """Where sigma / alpha reaches these values: float64."""
        return np.asarray(noise_to_signal, np.float64)

    def drift(self, t: Times) -> Any:
        """The factor f in dx = f x dt + g dw, 0."""
        return _numpy(t).zeros_like(t)

    def diffusion_squared(self, t: Times) -> Any:
        """The square of g in dx = f x dt + g dw."""
        return 2 * t


ContinuousSchedule = VPSchedule | VESchedule | FlowSchedule | EDMSchedule  # SubVPSchedule is a VPSchedule
Schedule = DiscreteSchedule | ContinuousSchedule

SCHEDULES: dict[str, Any] = {
    "discrete": DiscreteSchedule,
    "vp": VPSchedule,
    "sub_vp": SubVPSchedule,
    "ve": VESchedule,
    "flow": FlowSchedule,
    "edm": EDMSchedule,
}


def create_schedule(name: str, **fields: Any) -> Schedule:
    """The schedule called `name`.

    Raises:
      ValueError: if there is none, or it has no such field; lists the choices.
    """
    if name not in SCHEDULES:
        raise ValueError(f"no schedule is called {name!r}; choose one of {', '.join(SCHEDULES)}")
    known = [field.name for field in dataclasses.fields(SCHEDULES[name])]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"schedule {name!r} has no field {', '.join(unknown)}; it has {', '.join(known)}")
    return SCHEDULES[name](**fields)


def _numpy(t: Times) -> Any:
    """The library that computes with t."""
    return jnp if isinstance(t, jax.Array) else np
