"""Classifier-free guidance (Ho and Salimans 2022): uncond + w (cond - uncond), with w = 1 meaning none.

Other papers write cond + s (cond - uncond); that is w = 1 + s. A negative prompt is what `uncond` is told.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def guide(cond: Array, uncond: Array, weight: Float[Array, "*b"] | float) -> Array:
    """Uncond + weight (cond - uncond).

    Args:
      cond: outputs of the network, or estimates of the data; both are guided alike, as one is linear in the other.
      uncond: the same without the condition.
      weight: w, one for all or one a row.
    """
    weight = jnp.asarray(weight)
    weight = weight.reshape(weight.shape + (1,) * (cond.ndim - weight.ndim)) if weight.ndim else weight
    return uncond + weight * (cond - uncond)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly a sample follows its condition, and when.

    Attributes:
      weight: w.
      rescale: phi, how much of the guided estimate's spread is taken back to that of the conditional one (Lin et al.
        2023, eq. 15 and 16); 0 for none, 0.7 in the paper.
      start: of the interval of the process in which there is guidance, as a share of its time from noise (0) to data
        (1); before it w is 1 (Kynkaanniemi et al. 2024).
      stop: of this interval.
    """

    weight: Any = 1.0
    rescale: Any = 0.0
    start: Any = 0.0
    stop: Any = 1.0

    def __call__(self, cond: Array, uncond: Array, progress: Float[Array, ""]) -> Array:
        """The guided output.

        Args:
          cond: [B ...] outputs with the condition.
          uncond: [B ...] without it, or with a negative prompt.
          progress: share of the process that is behind, 0 at noise.
        """
        inside = (progress >= self.start) & (progress <= self.stop)
        guided = guide(cond, uncond, jnp.where(inside, self.weight, 1.0))
        axes = tuple(range(1, cond.ndim))
        spread = jnp.std(cond, axis=axes, keepdims=True) / jnp.maximum(jnp.std(guided, axis=axes, keepdims=True), 1e-12)
        rescale = jnp.where(inside, self.rescale, 0.0)
        return guided * (rescale * spread + (1 - rescale))

    def of_first(self, channels: int, cond: Array, uncond: Array, progress: Float[Array, ""]) -> Array:
        """The same of the first channels; others, as learned variances (Nichol et al. 2021), are those of `cond`."""
        guided = self(cond[..., :channels], uncond[..., :channels], progress)
        return jnp.concatenate([guided, cond[..., channels:]], axis=-1) if channels < cond.shape[-1] else guided


def pairs(x: Any) -> Any:
    """Each row twice, beside itself, so that a batch split over devices keeps a pair on one: a pytree of [B ...]."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), x)


def interleave(cond: Any, uncond: Any) -> Any:
    """Rows of both in turn, cond first: what goes with `pairs`; pytrees of [B ...] arrays."""
    return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:]), cond, uncond)


def separate(output: Array) -> tuple[Array, Array]:
    """Cond and uncond of the network's output [2 B ...] for rows in turn."""
    both = output.reshape(-1, 2, *output.shape[1:])
    return both[:, 0], both[:, 1]
