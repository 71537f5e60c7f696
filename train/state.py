"""What a training step carries forward."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from weights.power_averages import AVERAGES
from weights.run import overlay

Tree = Any

_WORD = 2**30


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      step: int32 [], updates done.
      examples_seen: int32 [2], examples consumed, where the data stream goes on; in two words (see `count_examples`),
        as a published run may see more than 2^31 of them.
      params: {part: tree}, trained by gradient where `config.trainable` says so.
      variables: {part: {collection: tree}}, updated without one; may be empty.
      ema_params: moving average of the trained ones of params, in float32 or finer, or {} without one.
      opt_state: of the optimizer, of the trained ones likewise.
      averages: power-function averages of the trained ones, see `weights.power_averages`, or {} without any.
    """

    step: Any
    examples_seen: Any
    params: Tree
    variables: Tree
    ema_params: Tree
    opt_state: Tree
    averages: Tree = struct.field(default_factory=dict)

    @property
    def inference_params(self) -> Tree:
        """The moving average where there is one, else the parameters themselves."""
        return overlay(self.params, self.ema_params)

    def as_trees(self) -> dict[str, Tree]:
        """Named trees for a checkpoint."""
        return {
            "progress": {"step": self.step, "examples_seen": self.examples_seen},
            "params": self.params,
            "variables": self.variables,
            "ema_params": self.ema_params,
            "opt_state": self.opt_state,
            AVERAGES: self.averages,
        }

    @classmethod
    def from_trees(cls, trees: dict[str, Tree]) -> "TrainState":
        """The inverse of `as_trees`."""
        rest = {name: tree for name, tree in trees.items() if name != "progress"}
        return cls(**trees["progress"], **rest)


def count_examples(words: Int[Array, "2"]) -> int:
    """The number that `TrainState.examples_seen` stands for: 2^30 times the first word, and the second."""
    high, low = (int(word) for word in jax.device_get(words))
    return high * _WORD + low


def add_examples(words: Int[Array, "2"], number: int) -> Int[Array, "2"]:
    """`TrainState.examples_seen` after `number` more examples, fewer than 2^30."""
    low = words[1] + number
    return jnp.stack([words[0] + low // _WORD, low % _WORD])


def create_state(
    params: Tree, variables: Tree, opt_state: Tree, averaged: Tree, averages: Tree | None = None
) -> TrainState:
    """State before the first update.

    Args:
      params: {part: tree}.
      variables: {part: {collection: tree}}.
      opt_state: of the optimizer.
      averaged: those of params of which there is a moving average, which starts at them; {} for none.
      averages: of `weights.power_averages.start`; None for none.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        examples_seen=jnp.zeros(2, jnp.int32),
        params=params,
        variables=variables,
        ema_params=start_average(averaged),
        opt_state=opt_state,
        averages=averages or {},
    )


def start_average(params: Tree) -> Tree:
    """The moving average of parameters before the first update: these, in float32 where they are in less.

    Copies: the step donates its input, and one buffer cannot be donated twice.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), params)
