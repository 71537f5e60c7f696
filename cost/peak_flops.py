"""The most matrix FLOPs a second that a device can do: what an achieved rate is compared with."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cost.chips import Peak, published_peak
from cost.timing import time_windows


def peak_flops(device: jax.Device, dtype: str, measure: Callable[[str, int], float] | None = None) -> Peak:
    """The published peak of a known device, or else what one large matmul reaches on it.

    Args:
      device: one of those at hand.
      dtype: "bfloat16" or "float32": what networks compute in.
      measure: (dtype, size of a matrix) -> FLOPs a second; None for `matmul_flops`.
    """
    published = published_peak(device.device_kind, dtype, getattr(device, "num_cores", 0) or 0)
    if published is not None:
        return published
    size = 2048 if device.platform == "cpu" else 8192
    flops = (measure or matmul_flops)(dtype, size)
    return Peak(flops, f"{device.device_kind}: measured {dtype} matmul of {size} x {size}")


def matmul_flops(dtype: str, size: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOPs a second of the fastest of several products of two [size size] matrices on the first device."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    multiply = jax.jit(jnp.matmul)

    def run(count: int) -> None:
        jax.block_until_ready([multiply(left, right) for _ in range(count)])

    return 2 * size**3 / time_windows(run, windows=5, steps=3, warmup=1, clock=clock).low
