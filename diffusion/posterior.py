"""Gaussians of a discrete chain and the variational bound (Ho et al. 2020, section 2; Nichol and Dhariwal 2021)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion.process import Process
from diffusion.schedule import DiscreteSchedule


def posterior_mean(schedule: DiscreteSchedule, x_0: Array, x_t: Array, t: Float[Array, "b"]) -> Array:
    """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7); x_0 itself at t = 0."""
    of_data, of_state, _, _ = _tables(schedule)
    return _rows(of_data, t, x_t) * x_0 + _rows(of_state, t, x_t) * x_t


def posterior_log_variance(schedule: DiscreteSchedule, t: Float[Array, "b"]) -> Float[Array, "b"]:
    """Log of the variance of q(x_{t-1} | x_t, x_0); at t = 0, where that is 0, the value of t = 1 instead."""
    return jnp.asarray(_tables(schedule)[2], jnp.float32)[t.astype(jnp.int32)]


def log_beta(schedule: DiscreteSchedule, t: Float[Array, "b"]) -> Float[Array, "b"]:
    """Logarithm of beta_t."""
    return jnp.asarray(_tables(schedule)[3], jnp.float32)[t.astype(jnp.int32)]


def gaussian_kl(mean_1: Array, log_variance_1: Array, mean_2: Array, log_variance_2: Array) -> Array:
    """KL(N_1 || N_2) of independent components, nats each."""
    difference = log_variance_2 - log_variance_1
    spread = jnp.exp(-difference) + jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2)
    return (difference + spread - 1) / 2


def discretized_log_likelihood(x: Array, mean: Array, log_variance: Array) -> Array:
    """Log of what a Gaussian puts on each pixel's bin, 1 / 127.5 wide, the outer ones open (Ho et al., eq. 13)."""
    distance, inverse = jnp.abs(x - mean), jnp.exp(-log_variance / 2)
    far, near = inverse * (distance + 1 / 255), inverse * (distance - 1 / 255)
    # Both sides mirrored to the tail where the distribution function is small: ln(cdf(-near) - cdf(-far)).
    log_near, log_far = (jax.scipy.stats.norm.logcdf(-edge) for edge in (near, far))
    inside = log_near + _log1mexp(log_near - log_far)
    sign = jnp.where(x <= -0.999, 1.0, -1.0)  # of the open side of the outermost bins
    open_edge = sign * inverse * (x - mean + sign / 255)
    return jnp.where(jnp.abs(x) >= 0.999, jax.scipy.stats.norm.logcdf(open_edge), inside)


def bound_terms(process: Process, output: Array, x_0: Array, x_t: Array, t: Float[Array, "b"]) -> Float[Array, "b"]:
    """The bound's term at t, bits per dimension: L_{t-1}, or at t = 0 the likelihood of pixels (Ho et al., eq. 5).

    Args:
      process: of a discrete schedule.
      output: of the network; with learned variances its second half of channels. Nothing is done to gradients here: to
        learn variances alone, stop that of the first half (Nichol and Dhariwal 2021, section 3.1).
      x_0: data in [-1, 1].
      x_t: its noisy state.
      t: times.

    Raises:
      ValueError: if the schedule is no chain.
    """
    schedule = process.schedule
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError("the variational bound is that of a chain; use schedule discrete, or diffusion.likelihood")
    small, large = (_like(f(schedule, t), x_t) for f in (posterior_log_variance, log_beta))
    if process.variance == "learned":
        output, values = jnp.split(output, 2, axis=-1)
        fraction = (values + 1) / 2
        log_variance = fraction * large + (1 - fraction) * small
    else:
        log_variance = jnp.broadcast_to(small if process.variance == "small" else _first(large, small, t), x_t.shape)
    estimate = process.data(output, x_t, t)
    if process.clip:
        estimate = jnp.clip(estimate, -1, 1)
    mean = posterior_mean(schedule, estimate, x_t, t)
    kl = gaussian_kl(posterior_mean(schedule, x_0, x_t, t), small, mean, log_variance)
    first = -discretized_log_likelihood(x_0, mean, log_variance)
    term = jnp.where(_like(t, x_t) == 0, first, kl)
    return jnp.mean(term, axis=tuple(range(1, x_t.ndim))) / math.log(2)


def _tables(schedule: DiscreteSchedule) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each t: the factors of x_0 and x_t in the posterior mean, the posterior's log variance, ln beta; float64."""
    alpha_bar = schedule.alpha_bar
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    of_data = np.sqrt(before) * beta / (1 - alpha_bar)
    of_state = np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
    variance[0] = variance[min(1, schedule.steps - 1)]
    return of_data, of_state, np.log(np.maximum(variance, 1e-20)), np.log(beta)


def _first(large: Array, small: Array, t: Array) -> Array:
    """Logarithm of beta_t, at t = 0 the posterior's log variance of t = 1, as the fixed large variance is published."""
    return jnp.where(_like(t, large) == 0, small, large)


def _rows(table: np.ndarray, t: Array, like: Array) -> Array:
    return _like(jnp.asarray(table, jnp.float32)[t.astype(jnp.int32)], like)


def _like(values: Array, like: Array) -> Array:
    """One value a row, shaped to multiply rows."""
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


def _log1mexp(x: Array) -> Array:
    """Logarithm of 1 - exp(-x), of x > 0."""
    x = jnp.maximum(x, 1e-12)
    small = x < math.log(2)
    # Each branch sees what keeps its gradient finite where the other is taken.
    of_small = jnp.log(-jnp.expm1(-jnp.where(small, x, 1.0)))
    return jnp.where(small, of_small, jnp.log1p(-jnp.exp(-jnp.where(small, 1.0, x))))
