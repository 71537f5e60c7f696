"""A diffusion process: how data is noised, what a network is to predict of it, and what its error counts.

It knows no network: an `output` is what some network made of a noisy state x_t = alpha x_0 + sigma eps.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.schedule import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    Schedule,
    VESchedule,
    VPSchedule,
    require,
)
from diffusion.solvers import VARIANCES

PREDICTIONS = ("eps", "x0", "v", "flow", "edm")
WEIGHTINGS = ("uniform", "min_snr", "clipped_snr")
TIMES = ("uniform", "logit_normal", "log_normal")

LOG_MEAN, LOG_STD = -1.2, 1.2  # of the noise levels that EDM trains on

Rows = Float[Array, "b *shape"]
Network = Callable[[Array, Float[Array, "b"]], Array]  # (x_t, the time that it was trained on) -> output


@dataclasses.dataclass(frozen=True)
class Process:
    """A schedule, and what is learned of it.

    Attributes:
      schedule: of the noise.
      prediction: what the network's output estimates: "eps", the noise (Ho et al. 2020, eq. 14); "x0", the data; "v",
        alpha eps - sigma x_0 (Salimans and Ho 2022, section 4); "flow", the velocity eps - x_0 of rectified flow;
        "edm", what is left of the data beside a share of x_t, both input and output of unit variance (Karras et al.
        2022, table 1), of schedules whose alpha is 1. Its weighting "uniform" is the paper's.
      variance: of the reverse steps of a chain: "small" or "large" (Ho et al. 2020, section 3.2), or "learned", a
        second half of the output's channels, in -1 to 1 where it interpolates (Nichol and Dhariwal 2021, eq. 15).
      weighting: of the squared error of the output: "uniform"; "min_snr", such that the error of x_0 counts min(SNR,
        gamma) whatever the prediction (Hang et al. 2023, eq. 8); "clipped_snr", such that it counts no less than 1
        either (truncated SNR: Salimans and Ho 2022, section 4), so that much noise is learned of too.
      gamma: where the weight stops to grow.
      times: how training draws t: "uniform"; "logit_normal", more in the middle (Esser et al. 2024, section 3.1);
        "log_normal", ln sigma from N(-1.2, 1.2^2) (Karras et al. 2022, table 1), of schedules whose alpha is 1.
      time_shift: added to a chain's t before the network sees it; 1 for networks that were fed 1 to T.
      sigma_data: standard deviation of the data, which "edm" is told.
      clip: estimates of the data are cut off at -1 and 1, as pixels are; never in a latent space.

    Raises:
      ValueError: on an unknown choice, or one that the schedule makes impossible.
    """

    schedule: Schedule
    prediction: str = "eps"
    variance: str = "small"
    weighting: str = "uniform"
    gamma: float = 5.0
    times: str = "uniform"
    time_shift: int = 0
    sigma_data: float = 0.5
    clip: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("prediction", PREDICTIONS),
            ("variance", VARIANCES),
            ("weighting", WEIGHTINGS),
            ("times", TIMES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        schedule = self.schedule
        discrete = isinstance(schedule, DiscreteSchedule)
        if isinstance(schedule, DiscreteSchedule) and schedule.zero_terminal_snr and self.prediction not in ("v", "x0"):
            raise ValueError(
                f"prediction {self.prediction!r} says nothing of the data where the last step is noise alone "
                "(zero_terminal_snr); choose v or x0"
            )
        if not discrete and self.variance != "small":
            raise ValueError(f"variance {self.variance!r} belongs to the steps of a chain; choose schedule discrete")
        if discrete and self.times != "uniform":
            raise ValueError(f"times {self.times!r} needs a schedule in continuous time")
        if not isinstance(schedule, EDMSchedule | VESchedule) and (
            self.prediction == "edm" or self.times == "log_normal"
        ):
            what = f"prediction {self.prediction!r}" if self.prediction == "edm" else f"times {self.times!r}"
            raise ValueError(f"{what} is of noise on unscaled data; choose schedule edm or ve")
        if not discrete and self.time_shift:
            raise ValueError("time_shift belongs to the steps of a chain; set it to 0")
        require("time_shift", self.time_shift, lambda n: n >= 0 and isinstance(n, int), "a whole number of at least 0")
        require("sigma_data", self.sigma_data, lambda sigma: sigma > 0, "above 0, the data's standard deviation")
        require("gamma", self.gamma, lambda ratio: ratio > 0, "above 0, the ratio where the weights stop to grow")
        if self.weighting == "clipped_snr" and not (self.gamma >= 1 and self.prediction != "eps"):
            raise ValueError(
                f"weighting 'clipped_snr' with prediction {self.prediction!r} and gamma={self.gamma} is impossible: it "
                "needs a gamma of at least 1, and would count noise's error without bound; choose x0, v or flow"
            )

    def network_time(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """What published networks of the schedule are fed.

        A chain's step, from 0 or (`time_shift`) from 1; 999 t for VP and sub-VP (Song et al.'s code), 1000 t for flow
        (Esser et al. 2024), ln sigma for VE; a quarter of that for EDM, and on any schedule with prediction "edm"
        (Karras et al. 2022, table 1).
        """
        schedule = self.schedule
        if isinstance(schedule, DiscreteSchedule):
            return t + self.time_shift
        if isinstance(schedule, VPSchedule):
            return 999 * t
        if isinstance(schedule, EDMSchedule) or self.prediction == "edm":
            return jnp.log(schedule.sigma(t)) / 4
        return 1000 * t if isinstance(schedule, FlowSchedule) else jnp.log(schedule.sigma(t))

    def network_input(self, x_t: Rows, t: Float[Array, "b"]) -> Rows:
        """What the network sees of x_t: itself, and for "edm" that of unit variance."""
        if self.prediction != "edm":
            return x_t
        _, sigma = self._factors(t, x_t)
        return x_t / jnp.sqrt(sigma**2 + self.sigma_data**2)

    def progress(self, t: Any) -> Any:
        """How far t is from data: 0 at the first time, 1 at the last; where t is a noise level, by its logarithm."""
        low, high = self.schedule.time_range
        if isinstance(self.schedule, EDMSchedule):
            return jnp.clip(jnp.log(t / low) / math.log(high / low), 0, 1)
        return (t - low) / max(high - low, 1e-9)

    def draw_time(self, u: Float[Array, "b"]) -> Float[Array, "b"]:
        """Times to train on, of numbers that are uniform in [0, 1)."""
        low, high = self.schedule.time_range
        if isinstance(self.schedule, DiscreteSchedule):
            return jnp.minimum(jnp.floor(u * self.schedule.steps), self.schedule.steps - 1)
        if self.times == "logit_normal":
            u = jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u, 1e-7, 1 - 1e-7)))
        if self.times == "log_normal":
            levels = jnp.exp(LOG_MEAN + LOG_STD * jax.scipy.special.ndtri(jnp.clip(u, 1e-7, 1 - 1e-7)))
            if isinstance(self.schedule, EDMSchedule):
                return levels
            sigma_min, sigma_max = (float(self.schedule.sigma(end)) for end in (0.0, 1.0))
            return jnp.clip(jnp.log(levels / sigma_min) / math.log(sigma_max / sigma_min), low, high)
        return low + (high - low) * u

    def noised(self, x_0: Rows, eps: Rows, t: Float[Array, "b"]) -> Rows:
        """x_t, a sample of q(x_t | x_0) (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self._factors(t, x_0)
        return alpha * x_0 + sigma * eps

    def target(self, x_0: Rows, eps: Rows, t: Float[Array, "b"]) -> Rows:
        """What the output should be."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x_0
        if self.prediction == "flow":
            return eps - x_0
        alpha, sigma = self._factors(t, x_0)
        if self.prediction == "edm":
            kept, scale = self._preconditioning(sigma)
            return (x_0 - kept * (x_0 + sigma * eps)) / scale
        return alpha * eps - sigma * x_0

    def data(self, output: Rows, x_t: Rows, t: Float[Array, "b"]) -> Rows:
        """The estimate of x_0 that an output means; not clipped."""
        if self.prediction == "x0":
            return output
        alpha, sigma = self._factors(t, x_t)
        if self.prediction == "eps":
            return (x_t - sigma * output) / alpha
        if self.prediction == "flow":
            return (x_t - sigma * output) / (alpha + sigma)
        if self.prediction == "edm":
            kept, scale = self._preconditioning(sigma)
            return kept * x_t + scale * output
        return (alpha * x_t - sigma * output) / (alpha * alpha + sigma * sigma)

    def eps(self, x_0: Rows, x_t: Rows, t: Float[Array, "b"]) -> Rows:
        """The noise in x_t, given the data in it."""
        alpha, sigma = self._factors(t, x_t)
        return (x_t - alpha * x_0) / sigma

    def weight(self, t: Float[Array, "b"]) -> Float[Array, "b"]:
        """What the squared error of the output at t counts."""
        if self.weighting == "uniform":
            return jnp.ones_like(t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        snr = jnp.square(alpha / sigma)
        # An error e of the output is an error of x_0 by this factor.
        if self.prediction == "eps":
            return jnp.minimum(1, self.gamma / snr)  # min(snr, gamma) / snr, also where the signal vanishes
        to_data = {
            "x0": jnp.ones_like(snr),
            "v": jnp.square(sigma / (alpha * alpha + sigma * sigma)),
            "flow": jnp.square(sigma / (alpha + sigma)),
            "edm": jnp.square(self._preconditioning(sigma)[1]),
        }
        least = 1.0 if self.weighting == "clipped_snr" else 0.0
        return jnp.clip(snr, least, self.gamma) * to_data[self.prediction]

    def denoiser(self, network: Network) -> Callable[[Array, Array], Any]:
        """The estimate of the data that solvers ask for.

        Args:
          network: from what it sees of x_t and the time that it was trained on, one for each row, to its output.

        Returns:
          denoise(x_t, t []) -> x_0; with learned variances -> (x_0, fraction in 0 to 1).
        """

        def denoise(x_t: Array, t: Array) -> Any:
            times = jnp.broadcast_to(t, x_t.shape[:1])
            seen = self.network_input(x_t, times)
            output, fraction = network(seen, self.network_time(times)).astype(jnp.float32), None
            if self.variance == "learned":
                output, values = jnp.split(output, 2, axis=-1)
                fraction = (values + 1) / 2
            x_0 = self.data(output, x_t, times)
            if self.clip:
                x_0 = jnp.clip(x_0, -1, 1)
            return x_0 if fraction is None else (x_0, fraction)

        return denoise

    def _preconditioning(self, sigma: Array) -> tuple[Array, Array]:
        """c_skip and c_out of Karras et al. 2022, table 1."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / jnp.sqrt(total)

    def _factors(self, t: Float[Array, "b"], like: Array) -> tuple[Array, Array]:
        """Alpha and sigma, shaped to multiply rows."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        return self.schedule.alpha(t).reshape(shape), self.schedule.sigma(t).reshape(shape)
