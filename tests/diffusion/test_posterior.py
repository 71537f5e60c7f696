"""The chain's Gaussians against brute force, and the variational bound against its closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.posterior import (
    bound_terms,
    discretized_log_likelihood,
    gaussian_kl,
    log_beta,
    posterior_log_variance,
    posterior_mean,
)
from diffusion.process import Process
from diffusion.schedule import DiscreteSchedule, VPSchedule

SCHEDULE = DiscreteSchedule(steps=50, end=0.2)


def test_the_posterior_is_bayes():
    # Product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), as Gaussians in x_{t-1}.
    t, x_0, x_t = 7, 0.3, -0.8
    before, beta = SCHEDULE.alpha_bar[t - 1], 1 - SCHEDULE.alpha_bar[t] / SCHEDULE.alpha_bar[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (math.sqrt(1 - beta) * x_t / beta + math.sqrt(before) * x_0 / (1 - before)) / precision
    times = jnp.array([7.0])
    np.testing.assert_allclose(
        posterior_mean(SCHEDULE, jnp.array([[x_0]]), jnp.array([[x_t]]), times), [[mean]], rtol=1e-5
    )
    np.testing.assert_allclose(posterior_log_variance(SCHEDULE, times), [-math.log(precision)], rtol=1e-5)
    np.testing.assert_allclose(log_beta(SCHEDULE, times), [math.log(beta)], rtol=1e-5)


def test_at_the_first_time_the_posterior_is_the_data():
    x_0, x_t = jnp.array([[0.3]]), jnp.array([[-0.8]])
    np.testing.assert_allclose(posterior_mean(SCHEDULE, x_0, x_t, jnp.zeros(1)), x_0, atol=1e-6)
    first, second = posterior_log_variance(SCHEDULE, jnp.array([0.0, 1.0]))
    assert first == second


def test_kl_of_gaussians():
    assert float(gaussian_kl(*map(jnp.asarray, (0.3, -1.0, 0.3, -1.0)))) == pytest.approx(0, abs=1e-7)
    # mean 1 apart, variances 1 and 4
    expected = 0.5 * (math.log(4) + (1 + 1) / 4 - 1)
    assert float(gaussian_kl(*map(jnp.asarray, (0.0, 0.0, 1.0, math.log(4.0))))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("mean", "log_variance"), [(0.1, -4.0), (-0.9, -8.0), (0.0, 2.0)])
def test_the_bins_of_pixels_share_the_whole_probability(mean, log_variance):
    pixels = jnp.arange(256) / 127.5 - 1
    values = jax.jit(discretized_log_likelihood)(pixels, jnp.asarray(mean), jnp.asarray(log_variance))
    assert float(jnp.sum(jnp.exp(values))) == pytest.approx(1, abs=1e-4)


def test_the_likelihood_of_pixels_is_finite_far_away():
    far = jnp.asarray(0.5), jnp.asarray(-0.5), jnp.asarray(-8.0)
    value, slope = jax.jit(jax.value_and_grad(discretized_log_likelihood, argnums=1))(*far)
    assert math.isfinite(float(value))
    assert math.isfinite(float(slope))


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_bound_of_a_gaussian(variance):
    # Data N(0, s^2) with its exact noise estimate: the mean is off by what x_t leaves unknown of x_0.
    std, count = 0.3, 4000
    process, times = Process(SCHEDULE, variance=variance), jnp.array([1.0, 10.0, 40.0])
    x_0 = std * jax.random.normal(jax.random.key(0), (3, count))
    x_t = process.noised(x_0, jax.random.normal(jax.random.key(1), x_0.shape), times)
    alpha, sigma = SCHEDULE.alpha(times)[:, None], SCHEDULE.sigma(times)[:, None]
    output = sigma * x_t / (alpha**2 * std**2 + sigma**2)
    if variance == "learned":
        output = jnp.concatenate([output, jnp.full_like(output, 0.5)], axis=1)
    terms = jax.jit(lambda *arrays: bound_terms(process, *arrays))(output, x_0, x_t, times)
    for place, t in enumerate((1, 10, 40)):
        before, after = SCHEDULE.alpha_bar[t - 1], SCHEDULE.alpha_bar[t]
        beta = 1 - after / before
        small = beta * (1 - before) / (1 - after)
        chosen = {"small": small, "large": beta, "learned": beta**0.75 * small**0.25}[variance]
        unknown = 1 / (1 / std**2 + after / (1 - after))
        error = before * (beta / (1 - after)) ** 2 * unknown
        expected = (math.log(chosen / small) + (small + error) / chosen - 1) / 2 / math.log(2)
        assert float(terms[place]) == pytest.approx(expected, rel=0.12)


def test_the_bound_needs_a_chain():
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="use schedule discrete"):
        bound_terms(Process(VPSchedule()), x, x, x, jnp.zeros(1))
