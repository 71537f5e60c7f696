"""Which kernel computes an attention where its implementation is "auto": the rules of each, as a function of facts.

The rules of cuDNN are those of `jax.nn.dot_product_attention`, and of NVIDIA's cudnn-frontend where these are narrower
(`validate_sdpa_support_surface` and the backward node, version 1.x): a choice that is made here must train, not only
run forward.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.layers.partitioning import device_platform

MASK_KINDS = ("none", "causal", "lengths", "dense")


@dataclasses.dataclass(frozen=True)
class Device:
    """What a choice needs to know of a device.

    Attributes:
      platform: such as "cpu", "gpu" or "tpu".
      compute_capability: of an NVIDIA GPU, such as (9, 0); None of any other device, and of one that this process does
        not have (compilation ahead of time).
    """

    platform: str
    compute_capability: tuple[int, int] | None = None


def device_in_context() -> Device:
    """The device that a program is traced for (see `device_platform`)."""
    platform = device_platform()
    if platform != "gpu" or jax.default_backend() != "gpu":
        return Device(platform)
    found = getattr(jax.local_devices()[0], "compute_capability", "")  # ROCm's is a name, "gfx90a"
    major, _, minor = found.partition(".")
    return Device(platform, (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None)


def choose_attention(device: Device, dtype: DTypeLike, head_dim: int, lengths: tuple[int, int], mask_kind: str) -> str:
    """The fused kernel where it can run and gains, else the plain one.

    * On NVIDIA GPUs "cudnn": compute capability 8.0 (Ampere) or later, bfloat16 or float16, heads whose width is a
      multiple of 8, at most 128 (256 on Hopper, whose backward pass alone takes them), more than one query or key, and
      a mask that it takes as a flag or as lengths. A dense mask becomes a bias, whose gradient the kernel's backward
      pass then writes, as large as the mask, although nobody reads it: so it is left to the compiler.
    * Anywhere else "xla". On a TPU the block-sparse kernel is not chosen for anybody: docs/performance.md has why.

    Args:
      device: that the program is for.
      dtype: of queries, keys and values.
      head_dim: K.
      lengths: (queries L, keys M).
      mask_kind: one of `MASK_KINDS`.

    Returns:
      "cudnn" or "xla".
    """
    if mask_kind not in MASK_KINDS:
        raise ValueError(f"unknown kind of mask {mask_kind!r}; choose one of {', '.join(MASK_KINDS)}")
    if device.compute_capability is None or device.compute_capability < (8, 0):
        return "xla"
    widest = 256 if device.compute_capability[0] == 9 else 128
    fits = (
        jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= widest
        and lengths != (1, 1)
    )
    return "cudnn" if fits and mask_kind != "dense" else "xla"
