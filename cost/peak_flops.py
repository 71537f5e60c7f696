"""The most matrix FLOPs a second that a device can do: what an achieved rate is compared with."""

import dataclasses
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cost.chips import CHIPS
from cost.timing import time_windows

# Kind of device -> (row of `CHIPS`, cores on a chip, cores that are one device as JAX starts it). Matmuls of float32
# are done in bfloat16 unless asked otherwise.
TPUS = {
    "TPU v3": ("v3", 2, 1),
    "TPU v4": ("v4", 2, 2),
    "TPU v5 lite": ("v5e", 1, 1),
    "TPU v5e": ("v5e", 1, 1),
    "TPU v5": ("v5p", 2, 2),
    "TPU v5p": ("v5p", 2, 2),
    "TPU v6 lite": ("v6e", 1, 1),
    "TPU v6e": ("v6e", 1, 1),
    "TPU7x": ("tpu7x", 2, 1),
}

# Dense tensor-core FLOPs a second in (bfloat16, TF32) by NVIDIA's data sheets; where those state the rate of 2:4 sparse
# matrices, half of it. The first pattern that is in the name of the device counts. Matmuls of float32 are done in TF32
# unless asked otherwise (docs.jax.dev, "Matmul precision").
GPUS = (
    (r"\bB200\b", 2250e12, 1125e12),
    (r"H[12]00 NVL", 835.5e12, 417.5e12),
    (r"H100 PCIe", 756.5e12, 378e12),
    (r"H[12]00\b", 989.5e12, 494.5e12),
    (r"\bA100\b", 312e12, 156e12),
    (r"\bL40S\b", 362e12, 183e12),
    (r"\bL40\b", 181e12, 90.5e12),
    (r"\bL4\b", 121e12, 60e12),
    (r"\bA10\b", 125e12, 62.5e12),
)


@dataclasses.dataclass(frozen=True)
class Peak:
    """A rate to compare with.

    Attributes:
      flops: of one device, a second.
      source: where the figure is from.
    """

    flops: float
    source: str


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


def published_peak(kind: str, dtype: str, cores: int = 0) -> Peak | None:
    """The vendor's figure for a device.

    Args:
      kind: what JAX calls it (`device_kind`).
      dtype: "bfloat16" or "float32".
      cores: of its chip's cores, how many the device is; 0 for what is usual.

    Returns:
      None for a device that is in neither table, and for a slice of a GPU.
    """
    if kind in TPUS:
        name, on_chip, usual = TPUS[kind]
        chip = CHIPS[name]
        return Peak(
            chip.flops * chip.devices * (cores or usual) / on_chip, f"{kind}: dense bfloat16 peak by its vendor"
        )
    if "MIG" not in kind:
        for pattern, bfloat16, tf32 in GPUS:
            if re.search(pattern, kind):
                rate, name = (bfloat16, "bfloat16") if dtype == "bfloat16" else (tf32, "TF32")
                return Peak(rate, f"{kind}: dense {name} peak by its data sheet")
    return None


def matmul_flops(dtype: str, size: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOPs a second of the fastest of several products of two [size size] matrices on the first device."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    multiply = jax.jit(jnp.matmul)

    def run(count: int) -> None:
        jax.block_until_ready([multiply(left, right) for _ in range(count)])

    return 2 * size**3 / time_windows(run, windows=5, steps=3, warmup=1, clock=clock).low
