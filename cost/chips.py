"""What one TPU or GPU has and can do at best, and the step time that follows from it: every fact about a chip.

Nothing here was measured: the rates are the vendor's, and a bound is what no program can beat on such a device.
"""

import dataclasses
import re

from cli.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU. A device is what JAX calls one: a whole chip, or one of its two cores.

    Attributes:
      name: what a topology's name begins with.
      devices: on a chip. Ahead of time, v3, v4 and TPU7x give two devices a chip, v5p one for both cores.
      hbm_bytes: of a device, as far as a program may use it: what the compiler names as available when memory runs out
        (libtpu 0.0.42.1). The published capacity of the chip is a little more.
      flops: dense bfloat16 FLOPs a second of a device.
      hbm_rate: bytes a second between a device and its memory.
      interconnect_rate: bytes a second that a device can send over all its links in a slice, in one direction.
      topologies: slices by name; others that the compiler takes are fine too.
    """

    name: str
    devices: int
    hbm_bytes: int
    flops: float
    hbm_rate: float
    interconnect_rate: float
    topologies: tuple[str, ...]


_PLANE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


def _chip(
    name: str, devices: int, hbm_gib: float, tflops: int, hbm_gb: int, links_gb: int, shapes: tuple[str, ...]
) -> Chip:
    """A row of the table: rates of a whole chip, in TFLOP/s and GB/s, memory of a device in GiB."""
    return Chip(
        name=name,
        devices=devices,
        hbm_bytes=int(hbm_gib * GIB),
        flops=tflops * 1e12 / devices,
        hbm_rate=hbm_gb * 1e9 / devices,
        interconnect_rate=links_gb * 1e9 / devices,
        topologies=shapes,
    )


# Rates of a chip by the page of its name under docs.cloud.google.com/tpu/docs (v3, v4, v5e, v5p-training, v6e, tpu7x).
# Of the interconnect's bandwidth in both directions together (v5e 400, v5p 1200, v6e 800, TPU7x 1200 GB/s), half. The
# pages of v3 and v4 only have the all-reduce bandwidth of a pod (340 TB/s, 1.1 PB/s), which is taken over its chips
# (1024, 4096); for v5e and v6e that gives the same half.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v3", 2, 15.48, 123, 900, 332, ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32")),
        _chip("v4", 2, 15.25, 275, 1200, 268, _CUBE),
        _chip("v5e", 1, 15.75, 197, 819, 200, ("1x1", *_PLANE)),
        _chip("v5p", 1, 95.74, 459, 2765, 600, _CUBE),
        _chip("v6e", 1, 31.25, 918, 1638, 400, ("1x1", *_PLANE)),
        _chip("tpu7x", 2, 94.75, 2307, 7380, 600, _CUBE),
    )
}

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

# Bytes a second between a GPU and its memory by the same data sheets; the first pattern that is in the name counts.
GPU_MEMORY_RATES = (
    (r"\bB200\b", 8000e9),
    (r"\bH200\b", 4800e9),
    (r"H100 NVL", 3900e9),
    (r"H100 PCIe", 2000e9),
    (r"\bH100\b", 3350e9),
    (r"A100 80GB PCIe", 1935e9),
    (r"A100\b.*\b80GB", 2039e9),
    (r"\bA100\b", 1555e9),
    (r"\bL40S?\b", 864e9),
    (r"\bL4\b", 300e9),
    (r"\bA10\b", 600e9),
)


# Memory of a GPU by its data sheet, which calls GB what `nvidia-smi` shows as about as many GiB.
GPU_GIB = {
    **{"rtx3090": 24, "rtx4090": 24, "a10": 24, "l4": 24, "rtx5090": 32, "l40s": 48},
    **{"a100-40": 40, "a100": 80, "h100": 80, "h200": 141},
}
# An assumption: the rest is for the driver's context, the libraries' work space and gaps between buffers.
GPU_USABLE = 0.92
GPU_COUNTS = (1, 2, 4, 8)  # of a machine


@dataclasses.dataclass(frozen=True)
class Gpu:
    """GPUs by their memory.

    Attributes:
      name: as it was asked for, such as "24" or "a100".
      memory_bytes: of one.
      count: how many; 0 if that was not said.
    """

    name: str
    memory_bytes: int
    count: int

    @property
    def usable_bytes(self) -> int:
        """Of one, for a program."""
        return int(self.memory_bytes * GPU_USABLE)


def gpu_of(text: str) -> Gpu:
    """Reads `24`, `a100`, `h200:8`: GiB or a name, and how many.

    Raises:
      UserError: if it is not written so, or there is no such name; lists the names.
    """
    found = re.fullmatch(r"([\w-]+?)(?:gb|gib)?(?::(\d+))?", text.lower())
    gib = 0
    if found is not None:
        gib = int(found[1]) if found[1].isdigit() else GPU_GIB.get(found[1], 0)
    if found is None or gib < 1 or found[2] == "0":
        names = ", ".join(GPU_GIB)
        raise UserError(f"unknown GPU {text!r}; give its GiB, such as 24, 80 or 141, or one of {names}; then :COUNT")
    return Gpu(found[1], gib * GIB, int(found[2] or 0))


@dataclasses.dataclass(frozen=True)
class Peak:
    """A rate to compare with.

    Attributes:
      flops: of one device, a second.
      source: where the figure is from.
    """

    flops: float
    source: str


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology such as `v5e:4x4`.

    Raises:
      UserError: if it is not written so, or there is no such chip; lists what there is.
    """
    found = re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", topology)
    if found is None or found[1] not in CHIPS:
        raise UserError(f"unknown topology {topology!r}; choose one of {known_topologies()}")
    return CHIPS[found[1]]


def known_topologies() -> str:
    """The names that a user can choose from, in one line."""
    return "; ".join(" ".join(f"{chip.name}:{shape}" for shape in chip.topologies) for chip in CHIPS.values())


@dataclasses.dataclass(frozen=True)
class Bound:
    """A lower bound of the time that a step takes (Williams et al. 2009, "Roofline").

    Attributes:
      compute: seconds for the matrix FLOPs at the device's peak.
      memory: seconds to read every argument and write every result once.
      interconnect: seconds to send what the collectives send, over all links at once.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The largest of the three: a step takes at least so long, as if all else were hidden behind it."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def name(self) -> str:
        """Which of the three that is."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))

    def utilization(self, chip: Chip, flops: int | float) -> float:
        """The share of its peak that a device reaches at this bound.

        Args:
          chip: the kind of device.
          flops: of a step and device, without what is computed a second time (Chowdhery et al. 2022, "PaLM", app. B).
        """
        return flops / chip.flops / self.seconds


def roofline(chip: Chip, *, flops: int | float, hbm_bytes: int | float, sent_bytes: int | float) -> Bound:
    """The bound of a step, from what one device does in it.

    Args:
      chip: the kind of device.
      flops: matrix FLOPs, those that are computed a second time included.
      hbm_bytes: arguments and results of the step.
      sent_bytes: by the collectives.
    """
    return Bound(flops / chip.flops, hbm_bytes / chip.hbm_rate, sent_bytes / chip.interconnect_rate)


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


def published_memory_rate(kind: str) -> float | None:
    """Bytes a second between a GPU and its memory by its vendor; None for one without a row, and for a slice of one.

    Args:
      kind: what JAX calls it (`device_kind`).
    """
    found = (rate for pattern, rate in GPU_MEMORY_RATES if re.search(pattern, kind))
    return None if "MIG" in kind else next(found, None)
