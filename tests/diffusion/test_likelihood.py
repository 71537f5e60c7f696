"""Exact likelihood against densities that are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.likelihood import bits_per_dimension, log_likelihood
from diffusion.schedule import FlowSchedule, SubVPSchedule, VESchedule, VPSchedule
from diffusion.times import continuous_grid


@pytest.mark.parametrize(
    "schedule", [VPSchedule(), SubVPSchedule(), VESchedule(), FlowSchedule()], ids=lambda s: type(s).__name__
)
def test_the_likelihood_of_a_gaussian(schedule, gaussian):
    x, time_min = jnp.array([[0.7], [0.2], [1.9]]), 1e-4
    value = jax.jit(lambda x: log_likelihood(schedule, gaussian.denoiser(schedule), x, time_min=time_min))(x)
    # The ODE is linear here: the density that it makes of N(0, sigma^2) at the last time.
    grid = continuous_grid(schedule, 1, time_min=time_min, time_max=1 - 1e-5)
    spread = [math.sqrt((grid.alpha[i] * gaussian.std) ** 2 + grid.sigma[i] ** 2) for i in (0, 1)]
    stretch, sigma = spread[0] / spread[1], grid.sigma[0]
    noise = grid.alpha[0] * gaussian.mean + stretch * (np.asarray(x)[:, 0] - grid.alpha[1] * gaussian.mean)
    expected = -np.square(noise / sigma) / 2 - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(stretch)
    np.testing.assert_allclose(np.asarray(value) / math.log(2), expected / math.log(2), atol=1e-3)


def test_the_likelihood_of_a_mixture_exact_and_estimated(mixture):
    schedule, means, std = VPSchedule(), mixture.means, mixture.std
    x = jnp.array([[2.0, 0.1], [0.0, -1.7]])
    denoise = mixture.denoiser(schedule)
    density = np.exp(-np.square(np.asarray(x)[:, None] - means).sum(-1) / (2 * std**2)).mean(1) / (2 * math.pi * std**2)
    exact = jax.jit(lambda x: log_likelihood(schedule, denoise, x))(x)
    np.testing.assert_allclose(exact / math.log(2), np.log2(density), atol=2e-3)
    probes = jax.random.rademacher(jax.random.key(0), (16, *x.shape), jnp.float32)
    estimated = jax.jit(lambda x: log_likelihood(schedule, denoise, x, probes=probes))(x)
    np.testing.assert_allclose(estimated, exact, atol=0.5)


def test_bits_of_a_uniform_byte():
    assert float(bits_per_dimension(jnp.array([3 * math.log(0.5)]), 3, 2 / 256)[0]) == pytest.approx(8)
