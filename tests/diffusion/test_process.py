"""Predictions and their meaning, weights, times, and what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli.config import load_config
from diffusion.process import PREDICTIONS, Process
from diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, SubVPSchedule, VESchedule, VPSchedule
from sample.samplers.from_config import build_process

ROOT = Path(__file__).resolve().parents[2]
CHAIN = DiscreteSchedule("scaled_linear", start=0.00085, end=0.012)
ZERO_SNR = DiscreteSchedule("scaled_linear", start=0.00085, end=0.012, zero_terminal_snr=True)
SCHEDULES = (CHAIN, VPSchedule(), SubVPSchedule(), VESchedule(sigma_max=5.0), FlowSchedule(), EDMSchedule())
# What is predicted of which schedule: EDM's needs data that are not scaled.
PAIRS = [
    pytest.param(schedule, prediction, id=f"{type(schedule).__name__}-{prediction}")
    for schedule in SCHEDULES
    for prediction in PREDICTIONS
    if prediction != "edm" or isinstance(schedule, VESchedule | EDMSchedule)
]


@pytest.fixture(scope="module")
def rows():
    data, eps = (jax.random.normal(jax.random.key(i), (3, 2, 2)) for i in range(2))
    return data, eps


def _times(schedule):
    return Process(schedule).draw_time(jnp.array([0.1, 0.5, 0.8]))


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_the_target_gives_back_data_and_noise(schedule, prediction, rows):
    process, t = Process(schedule, prediction), _times(schedule)
    data, eps = rows
    x_t = process.noised(data, eps, t)
    estimate = process.data(process.target(data, eps, t), x_t, t)
    np.testing.assert_allclose(estimate, data, atol=1e-4)
    np.testing.assert_allclose(process.eps(data, x_t, t), eps, atol=1e-4)


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_min_snr_counts_the_same_whatever_is_predicted(schedule, prediction, rows):
    # An output that is wrong by a given error of the data must cost min(SNR, gamma) times that error squared.
    process, t = Process(schedule, prediction, weighting="min_snr", gamma=5.0), _times(schedule)
    data, eps = rows
    x_t = process.noised(data, eps, t)
    target = process.target(data, eps, t)
    output = target + 0.1
    error = jnp.square(process.data(output, x_t, t) - data)[:, 0, 0]
    snr = jnp.square(schedule.alpha(t) / schedule.sigma(t))
    np.testing.assert_allclose(process.weight(t) * 0.1**2, jnp.minimum(snr, 5.0) * error, rtol=2e-3)


def test_min_snr_of_v_is_finite_where_the_signal_vanishes():
    weight = Process(ZERO_SNR, "v", weighting="min_snr").weight(jnp.array([998.0, 999.0]))
    assert np.all(np.isfinite(weight))
    assert weight[1] == 0
    # 5 / (SNR + 1) at a high ratio, not 5 / SNR
    t = jnp.array([50.0])
    snr = np.square(CHAIN.alpha(np.array([50.0])) / CHAIN.sigma(np.array([50.0])))
    assert snr > 5
    np.testing.assert_allclose(Process(CHAIN, "v", weighting="min_snr").weight(t), 5 / (snr + 1), rtol=1e-4)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_clipped_snr_counts_errors_under_much_noise_too(prediction, rows):
    process, t = Process(CHAIN, prediction, weighting="clipped_snr", gamma=5.0), jnp.array([10.0, 500.0, 990.0])
    data, eps = rows
    x_t = process.noised(data, eps, t)
    output = process.target(data, eps, t) + 0.1
    error = jnp.square(process.data(output, x_t, t) - data)[:, 0, 0]
    snr = jnp.square(CHAIN.alpha(t) / CHAIN.sigma(t))
    assert snr[0] > 5
    assert snr[2] < 1
    counts = [5.0, np.clip(float(snr[1]), 1, 5), 1.0]
    np.testing.assert_allclose(process.weight(t) * 0.1**2, np.array(counts) * error, rtol=2e-3)


def test_v_is_defined_at_pure_noise(rows):
    process, t = Process(ZERO_SNR, "v"), jnp.full(3, 999.0)
    data, eps = rows
    x_t = process.noised(data, eps, t)
    np.testing.assert_allclose(x_t, eps, atol=1e-6)
    np.testing.assert_allclose(process.data(process.target(data, eps, t), x_t, t), data, atol=1e-6)


def test_times_are_drawn_evenly_and_within_the_schedule():
    u = (jnp.arange(10000) + 0.5) / 10000
    chain = np.asarray(Process(DiscreteSchedule(steps=10)).draw_time(u))
    assert np.bincount(chain.astype(int)).tolist() == [1000] * 10
    continuous = np.asarray(Process(VPSchedule()).draw_time(u))
    assert continuous.min() >= 1e-5
    assert continuous.max() <= 1
    middle = np.asarray(Process(FlowSchedule(), "flow", times="logit_normal").draw_time(u))
    assert middle.mean() == pytest.approx(0.5, abs=1e-3)
    assert np.mean(np.abs(middle - 0.5) < 0.25) > 0.7  # 0.5 if uniform


def test_the_network_is_fed_what_published_networks_were():
    t = jnp.array([0.0, 1.0])
    assert Process(CHAIN).network_time(t).tolist() == [0, 1]
    assert Process(CHAIN, time_shift=1).network_time(t).tolist() == [1, 2]
    assert Process(VPSchedule()).network_time(t).tolist() == [0, 999]
    assert Process(FlowSchedule(), "flow").network_time(t).tolist() == [0, 1000]
    np.testing.assert_allclose(Process(VESchedule()).network_time(t), np.log([0.01, 50]), rtol=1e-5)
    np.testing.assert_allclose(Process(VESchedule(), "edm").network_time(t), np.log([0.01, 50]) / 4, rtol=1e-5)
    np.testing.assert_allclose(Process(EDMSchedule()).network_time(jnp.array([2.0])), np.log([2.0]) / 4, rtol=1e-5)


def test_edm_s_network_sees_and_makes_unit_variance():
    """Table 1 of Karras et al. 2022: its scalings, its weight of the estimate's error, its noise levels in training."""
    process = Process(EDMSchedule(), "edm", times="log_normal", sigma_data=0.4)
    rng = np.random.default_rng(0)
    data, eps = (jnp.asarray(rng.normal(size=(3, 20_000)), jnp.float32) for _ in range(2))
    data, sigma = 0.4 * data, np.array([0.05, 0.5, 30.0])
    t = jnp.asarray(sigma, jnp.float32)
    x_t, target = process.noised(data, eps, t), process.target(data, eps, t)
    np.testing.assert_allclose(np.std(process.network_input(x_t, t), axis=1), 1, rtol=0.03)
    np.testing.assert_allclose(np.std(target, axis=1), 1, rtol=0.03)
    np.testing.assert_allclose(process.data(jnp.zeros_like(x_t), x_t, t)[:, 0], 0.16 / (sigma**2 + 0.16) * x_t[:, 0])
    error = jnp.square(process.data(target + 0.1, x_t, t) - data).mean(axis=1)
    counts = (sigma**2 + 0.4**2) / (sigma * 0.4) ** 2
    np.testing.assert_allclose(process.weight(t) * 0.1**2, counts * error, rtol=5e-3)
    drawn = np.log(process.draw_time((jnp.arange(10_000) + 0.5) / 10_000))
    assert (drawn.mean(), drawn.std()) == pytest.approx((-1.2, 1.2), abs=0.01)
    assert process.progress(jnp.array([0.002, 0.4, 80.0])).tolist() == pytest.approx([0, 0.5, 1], abs=1e-3)


@pytest.mark.parametrize("name", ["scenes/ddpm_unet.py", "scenes/latent_unet.py", "paper/dit.py:sit_s2"])
def test_edm_is_told_the_deviation_of_pixels_or_of_latents(name, rows):
    """Karras et al. 2022, table 1, with sigma_data 0.5 for pixels in [-1, 1] and 1 for latents as they are scaled."""
    options = [f"--config={ROOT}/configs/{name}", "--config.process.prediction=edm"]
    config = load_config(options)
    with config.unlocked():
        config.process.schedule = ConfigDict({"name": "edm"})
        config.process.times, config.process.clip = "log_normal", False
        config.process.weighting = "uniform"
    process, sigma_data = build_process(config), 0.5 if "ddpm" in name else 1.0
    (x_0, eps), sigma = rows, jnp.array([0.02, 1.0, 40.0])
    level, total = sigma[:, None, None], sigma[:, None, None] ** 2 + sigma_data**2
    x_t = x_0 + level * eps
    c_skip, c_out = sigma_data**2 / total, level * sigma_data / np.sqrt(total)
    np.testing.assert_allclose(process.network_input(x_t, sigma), x_t / np.sqrt(total), rtol=1e-5)
    np.testing.assert_allclose(process.data(eps, x_t, sigma), c_skip * x_t + c_out * eps, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(process.target(x_0, eps, sigma), (x_0 - c_skip * x_t) / c_out, rtol=1e-3, atol=1e-4)


def test_the_denoiser_estimates_the_data(rows):
    data, eps = rows
    for schedule, t in ((CHAIN, 300.0), (CHAIN, 300.25), (VPSchedule(), 0.4)):
        process = Process(schedule)
        x_t = process.noised(data, eps, jnp.full(3, t))
        seen = []

        def network(x, time, seen=seen):
            seen.append(time)
            return eps

        np.testing.assert_allclose(process.denoiser(network)(x_t, jnp.asarray(t)), data, atol=1e-5)
        np.testing.assert_allclose(seen[0], process.network_time(jnp.full(3, t)))


def test_the_denoiser_clips_and_splits_where_asked(rows):
    data, _ = rows
    t = jnp.asarray(10.0)
    clipped = Process(CHAIN, "x0", clip=True).denoiser(lambda x, time: 3 * data)(data, t)
    assert float(jnp.abs(clipped).max()) == 1
    learned = Process(CHAIN, "x0", variance="learned").denoiser(
        lambda x, time: jnp.concatenate([data, jnp.full_like(data, -1)], axis=-1)
    )
    estimate, fraction = learned(data, t)
    np.testing.assert_allclose(estimate, data)
    np.testing.assert_allclose(fraction, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": ZERO_SNR}, "prediction 'eps' says nothing of the data .* choose v or x0"),
        ({"schedule": ZERO_SNR, "prediction": "flow"}, "prediction 'flow' says nothing"),
        ({"schedule": CHAIN, "prediction": "score"}, "unknown prediction 'score'; choose one of eps"),
        ({"schedule": VPSchedule(), "variance": "learned"}, "belongs to the steps of a chain"),
        ({"schedule": CHAIN, "times": "logit_normal"}, "needs a schedule in continuous time"),
        ({"schedule": VPSchedule(), "time_shift": 1}, "time_shift belongs to the steps of a chain"),
        ({"schedule": FlowSchedule(), "prediction": "edm"}, "'edm' is of noise on unscaled data"),
        ({"schedule": VPSchedule(), "times": "log_normal"}, "'log_normal' is of noise on unscaled data"),
        ({"schedule": EDMSchedule(), "prediction": "edm", "sigma_data": 0.0}, "sigma_data=0.0 is impossible"),
        ({"schedule": CHAIN, "weighting": "min_snr", "gamma": 0.0}, "gamma=0.0 is impossible"),
        ({"schedule": CHAIN, "weighting": "clipped_snr"}, "'clipped_snr' with prediction 'eps'"),
        ({"schedule": CHAIN, "weighting": "clipped_snr", "prediction": "v", "gamma": 0.5}, "gamma of at least 1"),
    ],
)
def test_an_impossible_process_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Process(**fields)
