"""Guidance: exact at 0 and 1, inside its interval alone, rescaled to the conditional spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import solvers
from diffusion.guidance import Guidance, guide, interleave, pairs, separate
from diffusion.plan import solve
from diffusion.schedule import VPSchedule
from diffusion.times import continuous_grid


@pytest.fixture(scope="module")
def outputs():
    return tuple(jax.random.normal(jax.random.key(i), (3, 4, 4, 2)) for i in range(2))


def test_weights_of_zero_and_one_are_the_two_outputs(outputs):
    cond, uncond = outputs
    np.testing.assert_array_equal(guide(cond, uncond, 0.0), uncond)
    np.testing.assert_allclose(guide(cond, uncond, 1.0), cond, atol=1e-6)
    np.testing.assert_allclose(guide(cond, uncond, 3.0), uncond + 3 * (cond - uncond), atol=1e-6)
    rows = guide(cond, uncond, jnp.array([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(rows[2], guide(cond, uncond, 3.0)[2], atol=1e-6)
    np.testing.assert_array_equal(rows[0], uncond[0])


def test_outside_its_interval_there_is_none(outputs):
    cond, uncond = outputs
    guidance = Guidance(5.0, rescale=0.7, start=0.2, stop=0.8)
    for progress in (0.1, 0.9):
        np.testing.assert_allclose(guidance(cond, uncond, jnp.asarray(progress)), cond, atol=1e-5)
    assert not np.allclose(guidance(cond, uncond, jnp.asarray(0.5)), cond)


def test_a_full_rescale_has_the_spread_of_the_conditional_output(outputs):
    cond, uncond = outputs
    guided = Guidance(7.5, rescale=1.0)(cond, uncond, jnp.asarray(0.5))
    np.testing.assert_allclose(jnp.std(guided, axis=(1, 2, 3)), jnp.std(cond, axis=(1, 2, 3)), rtol=1e-5)


def test_pairs_stay_beside_each_other(outputs):
    cond, uncond = outputs
    rows = interleave({"a": cond}, {"a": uncond})["a"]
    back = separate(rows)
    np.testing.assert_array_equal(back[0], cond)
    np.testing.assert_array_equal(back[1], uncond)
    np.testing.assert_array_equal(pairs(cond)[::2], cond)
    np.testing.assert_array_equal(pairs(cond)[1::2], cond)


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_guidance_of_a_mixture(weight, mixture):
    # The condition is "one of the first two modes". Weight 0 draws from all modes and 1 from those two, both exactly.
    schedule, means, count = VPSchedule(), mixture.means, 2000
    grid = continuous_grid(schedule, 40, "log_snr", time_min=1e-3)
    cond, uncond = mixture.denoiser(schedule, modes=2), mixture.denoiser(schedule)

    def denoise(x, t):
        return guide(cond(x, t), uncond(x, t), weight)

    x = np.random.default_rng(1).standard_normal((count, 2)).astype(np.float32)
    end = np.asarray(jax.jit(lambda x: solve(solvers.dpm_solver_multistep(grid), denoise, x).x)(x))
    near = np.linalg.norm(end[:, None] - means, axis=-1).argmin(1)
    share, expected = np.bincount(near, minlength=8)[:2].sum() / count, {0.0: 0.25, 1.0: 1.0, 3.0: 1.0}[weight]
    assert abs(share - expected) <= 4 * (expected * (1 - expected) / count) ** 0.5
    if weight == 1.0:
        spread = np.square(end - means[near]).sum(1).mean()
        assert spread == pytest.approx(2 * mixture.std**2, rel=0.1)


def test_channels_that_are_not_guided_follow_the_condition_alone():
    """As DiT's code guides 3 of 4 channels; learned variances are the conditional ones too."""
    cond, uncond = (jax.random.normal(jax.random.key(i), (2, 4, 4, 8)) for i in range(2))
    for channels in (3, 4):
        guided = Guidance(4.0).of_first(channels, cond, uncond, jnp.float32(0.5))
        expected = (uncond + 4.0 * (cond - uncond))[..., :channels]
        np.testing.assert_allclose(guided[..., :channels], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(guided[..., channels:], cond[..., channels:])
