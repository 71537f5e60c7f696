"""Flags of XLA's CPU compiler that make programs faster.

XLA of jax 0.10 hands float32 convolutions to its library YNN, which gives those of 64 channels and fewer no second
core, and computes a kernel's gradient at half the speed of Eigen on one core too. On two cores of an EPYC (Zen 4) Eigen
took a forward pass of a small UNet at batch 32 from 111 to 83 ms, and a training pass from 469 to 327; jax 0.12 does as
0.10. docs/performance.md says how the flag is measured.
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
