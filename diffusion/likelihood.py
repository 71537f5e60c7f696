"""Exact likelihood of a diffusion in continuous time, by its probability-flow ODE (Song et al. 2021, appendix D.2)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion.plan import Denoise
from diffusion.schedule import ContinuousSchedule
from diffusion.times import continuous_grid


def log_likelihood(
    schedule: ContinuousSchedule,
    denoise: Denoise,
    x: Float[Array, "b *shape"],
    *,
    steps: int = 100,
    time_min: float = 1e-5,
    probes: Any = None,
) -> Float[Array, "b"]:
    """The logarithm of p(x), nats, of data at noise level `time_min`.

        d ln p(x_t) / dt = - div(f x - g^2 score / 2), from the Gaussian at the last time back to the data,

    by the classical Runge-Kutta method on times that are evenly apart in lambda, four network calls a step. For
    discrete data, such as bytes, add uniform noise of the width of a bin first, and count the bin's volume.

    Args:
      schedule: in continuous time.
      denoise: the network's estimate of x_0; its rows do not depend on each other.
      x: data.
      steps: of the integration.
      time_min: where it starts.
      probes: None, the exact divergence, which asks for a derivative per dimension; or [P B ...] random signs or normal
        numbers, with which it is estimated without bias (Hutchinson; the paper's eq. 40).
    """
    dimensions = math.prod(x.shape[1:])
    first = max(time_min, schedule.time_range[0])
    # Flow's score has no limit at its very end, where it is all noise.
    last = min(schedule.time_range[1], 1 - 1e-5) if schedule.alpha(schedule.time_range[1]) == 0 else None
    times = continuous_grid(schedule, steps, "log_snr", time_min=first, time_max=last).t[::-1]

    def velocity(x: Array, t: Array) -> Array:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        score = (alpha * denoise(x, t) - x) / (sigma * sigma)
        return schedule.drift(t) * x - schedule.diffusion_squared(t) * score / 2

    def exact(x: Array, t: Array) -> tuple[Array, Array]:
        def along(direction: Array) -> Array:
            tangent = jnp.broadcast_to(direction.reshape(x.shape[1:]), x.shape)
            value = jax.jvp(lambda y: velocity(y, t), (x,), (tangent,))[1]
            return jnp.sum(value * tangent, axis=tuple(range(1, x.ndim)))

        return velocity(x, t), jnp.sum(jax.lax.map(along, jnp.eye(dimensions)), axis=0)

    def estimated(x: Array, t: Array) -> tuple[Array, Array]:
        def along(probe: Array) -> Array:
            value = jax.jvp(lambda y: velocity(y, t), (x,), (probe,))[1]
            return jnp.sum(value * probe, axis=tuple(range(1, x.ndim)))

        return velocity(x, t), jnp.mean(jax.lax.map(along, probes), axis=0)

    slope = exact if probes is None else estimated

    def body(carry: tuple[Array, Array], ends: Array) -> tuple[tuple[Array, Array], None]:
        x, total = carry
        t, after = ends
        h = after - t
        v_1, d_1 = slope(x, t)
        v_2, d_2 = slope(x + h / 2 * v_1, t + h / 2)
        v_3, d_3 = slope(x + h / 2 * v_2, t + h / 2)
        v_4, d_4 = slope(x + h * v_3, after)
        x = x + h / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
        return (x, total + h / 6 * (d_1 + 2 * d_2 + 2 * d_3 + d_4)), None

    ends = jnp.asarray(np.stack([times[:-1], times[1:]], axis=1), jnp.float32)
    (x, divergence), _ = jax.lax.scan(body, (x, jnp.zeros(len(x))), ends)
    sigma = float(schedule.sigma(times[-1]))
    axes = tuple(range(1, x.ndim))
    prior = -jnp.sum(jnp.square(x / sigma), axis=axes) / 2 - dimensions * math.log(sigma * math.sqrt(2 * math.pi))
    return prior + divergence


def bits_per_dimension(log_p: Float[Array, "b"], dimensions: int, bin_width: float = 1.0) -> Float[Array, "b"]:
    """-log2 of the probability of a bin, per dimension; 2 / 255 is the width of a byte's in [-1, 1]."""
    return -(log_p / dimensions + math.log(bin_width)) / math.log(2)
