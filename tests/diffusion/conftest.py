"""Data whose distribution is known, and with it the exact denoiser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2)."""

    mean: float = 0.7
    std: float = 0.5

    def denoiser(self, schedule):
        """E[x_0 | x_t]."""

        def denoise(x, t):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            return (alpha * self.std**2 * x + sigma**2 * self.mean) / (alpha**2 * self.std**2 + sigma**2)

        return denoise

    def end(self, grid, x):
        """Where the probability-flow ODE takes x of the grid's first time."""
        first, last = (np.sqrt((grid.alpha[i] * self.std) ** 2 + grid.sigma[i] ** 2) for i in (0, -1))
        return grid.alpha[-1] * self.mean + (x - grid.alpha[0] * self.mean) * last / first


@dataclasses.dataclass(frozen=True)
class Mixture:
    """An even mixture of eight Gaussians on a circle in the plane."""

    std: float = 0.2
    radius: float = 2.0

    @property
    def means(self):
        """Centers, [8 2]."""
        angle = 2 * np.pi * np.arange(8) / 8
        return (self.radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)

    def denoiser(self, schedule, modes=8):
        """E[x_0 | x_t], of the first modes."""
        means = jnp.asarray(self.means[:modes])

        def denoise(x, t):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            variance = (alpha * self.std) ** 2 + sigma**2
            difference = x[:, None] - alpha * means
            weight = jax.nn.softmax(-jnp.sum(difference**2, axis=-1) / (2 * variance), axis=-1)[..., None]
            data = (alpha * self.std**2 * x[:, None] + sigma**2 * means) / variance
            return jnp.sum(weight * data, axis=1)

        return denoise


@pytest.fixture(scope="session")
def gaussian():
    return Gaussian()


@pytest.fixture(scope="session")
def mixture():
    return Mixture()
