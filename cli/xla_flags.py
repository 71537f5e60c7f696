"""Flags of XLA's CPU compiler that make programs faster.

XLA of jax 0.10 hands float32 convolutions to its library YNN, which gives those of 64 channels and fewer no second
core, and computes a kernel's gradient at half the speed of Eigen on one core too. 3 x 3, 48 channels, 16 pictures of
32 x 32, forward and gradients of input and kernel: 3.4, 3.5, 6.6 ms on two cores of an EPYC (Zen 5) with YNN, 1.9, 1.9,
2.5 without; on one core 3.5, 3.5, 12.7 and 3.5, 3.5, 4.1. jax 0.12 likewise; docs/performance.md has more of them, and
training steps.
"""

import importlib.metadata
import os
import re

from cli.accelerators import runs_on_cpu

# Later ones may drop the flag, and XLA ends the process at a flag that it does not know.
VERSIONS = ((0, 10, 2), (0, 13))
FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def convolve_with_eigen() -> None:
    """Takes convolutions from YNN in this process and its children, by XLA_FLAGS; to be called before JAX computes.

    It returns at once with an accelerator, with a jaxlib that this was not measured with, and where XLA_FLAGS has the
    flag: `XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=+individual_convolution` leaves XLA as it is.
    """
    own = os.environ.get("XLA_FLAGS", "")
    if FLAG in own or not runs_on_cpu():
        return
    version = tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("jaxlib"))[:3])
    if VERSIONS[0] <= version < VERSIONS[1]:
        os.environ["XLA_FLAGS"] = f"{own} {FLAG}=-individual_convolution".strip()
