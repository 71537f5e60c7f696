"""Which accelerators this machine shows, without asking JAX, whose import has to wait for the answer."""

import glob
import importlib.util
import os

TPUS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
# NVIDIA (also in WSL), AMD, Google.
DEVICES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", *TPUS)


def has_accelerator() -> bool:
    """True if there is a device file of an accelerator."""
    return any(glob.glob(pattern) for pattern in DEVICES)


def runs_on_cpu() -> bool:
    """True if JAX_PLATFORMS says so, or says nothing and the machine shows no accelerator."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" if platforms else not has_accelerator()


def has_tpu() -> bool:
    """True if there is a device file of a TPU, and the library to use it."""
    return any(glob.glob(pattern) for pattern in TPUS) and importlib.util.find_spec("libtpu") is not None


def spare_the_search_for_a_tpu() -> None:
    """Chooses the CPU where libtpu is installed (to compile with, see scripts.fit) but there is no accelerator.

    JAX would otherwise look for a TPU at every start and print what it did not find. JAX_PLATFORMS, if set, stays.
    """
    if not os.environ.get("JAX_PLATFORMS") and not has_accelerator() and importlib.util.find_spec("libtpu"):
        os.environ["JAX_PLATFORMS"] = "cpu"
