"""Peaks: the vendors' for known devices, a measured matmul for others."""

import jax
import jax.numpy as jnp
import pytest

from cost import peak_flops
from cost.chips import Peak, published_peak


@pytest.mark.parametrize(
    ("kind", "dtype", "cores", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 0, 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 0, 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 0, 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 0, 756.5),
        ("NVIDIA H100 NVL", "bfloat16", 0, 835.5),
        ("NVIDIA GH200 480GB", "bfloat16", 0, 989.5),
        ("NVIDIA H200", "float32", 0, 494.5),
        ("NVIDIA L4", "bfloat16", 0, 121),
        ("NVIDIA L40S", "bfloat16", 0, 362),
        ("TPU v3", "bfloat16", 0, 61.5),
        ("TPU v4", "bfloat16", 0, 275),
        ("TPU v4", "bfloat16", 1, 137.5),
        ("TPU v5 lite", "float32", 1, 197),
        ("TPU v5p", "bfloat16", 2, 459),
        ("TPU v6 lite", "bfloat16", 0, 918),
        ("TPU7x", "bfloat16", 1, 1153.5),
    ],
)
def test_published_peaks_of_one_device(kind, dtype, cores, tflops):
    peak = published_peak(kind, dtype, cores)
    assert peak is not None and peak.flops == pytest.approx(tflops * 1e12)
    arithmetic = "TF32" if "NVIDIA" in kind and dtype == "float32" else "bfloat16"
    assert kind in peak.source and arithmetic in peak.source


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA A10G", "NVIDIA GB200", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "TPU v9"])
def test_nothing_is_guessed_for_other_devices(kind):
    assert published_peak(kind, "bfloat16") is None


def test_only_a_device_without_a_published_peak_is_measured(monkeypatch):
    asked = []

    def measure(dtype: str, size: int) -> float:
        asked.append((dtype, size))
        return 7.0

    peak = peak_flops.peak_flops(jax.devices()[0], "bfloat16", measure)
    assert peak.flops == 7.0 and asked == [("bfloat16", 2048)]
    assert peak.source == "cpu: measured bfloat16 matmul of 2048 x 2048"

    published = Peak(5.0, "a table")
    monkeypatch.setattr(peak_flops, "published_peak", lambda kind, dtype, cores: published)
    assert peak_flops.peak_flops(jax.devices()[0], "bfloat16", measure) == published and len(asked) == 1


def test_the_measured_rate_is_two_n_cubed_over_the_fastest_product(monkeypatch):
    now, durations = [0.0], iter([1.0, 2.0, 0.5, 0.25, 1.0, 1.0])
    inputs = []

    def block(products):
        assert all(jnp.shape(product) == (64, 64) for product in products)
        inputs.append(products[0].dtype)
        now[0] += len(products) * next(durations)

    monkeypatch.setattr(jax, "block_until_ready", block)
    assert peak_flops.matmul_flops("bfloat16", 64, clock=lambda: now[0]) == pytest.approx(2 * 64**3 / 0.25)
    assert set(inputs) == {jnp.dtype("bfloat16")}
