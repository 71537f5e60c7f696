"""What a training step carries forward."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Tree = Any


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      step: int32 [], updates done.
      examples_seen: int32 [], examples consumed; where the data stream goes on.
      params: {part: tree}, trained by gradient.
      variables: {part: {collection: tree}}, updated without one; may be empty.
      ema_params: moving average of params, or {} without one.
      opt_state: of the optimizer.
    """

    step: Any
    examples_seen: Any
    params: Tree
    variables: Tree
    ema_params: Tree
    opt_state: Tree

    @property
    def inference_params(self) -> Tree:
        """The moving average where there is one, else the parameters themselves."""
        return self.ema_params if jax.tree.leaves(self.ema_params) else self.params

    def as_trees(self) -> dict[str, Tree]:
        """Named trees for a checkpoint."""
        return {
            "progress": {"step": self.step, "examples_seen": self.examples_seen},
            "params": self.params,
            "variables": self.variables,
            "ema_params": self.ema_params,
            "opt_state": self.opt_state,
        }

    @classmethod
    def from_trees(cls, trees: dict[str, Tree]) -> "TrainState":
        """The inverse of `as_trees`."""
        rest = {name: tree for name, tree in trees.items() if name != "progress"}
        return cls(**trees["progress"], **rest)


def create_state(params: Tree, variables: Tree, opt_state: Tree, ema: bool) -> TrainState:
    """State before the first update; the moving average starts at the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        examples_seen=jnp.zeros((), jnp.int32),
        params=params,
        variables=variables,
        # A copy: the step donates its input, and one buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params) if ema else {},
        opt_state=opt_state,
    )
