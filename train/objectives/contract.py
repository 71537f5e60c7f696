"""The contract of an objective: what it takes, what it returns, and where its randomness comes from."""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, UInt8

Metrics = dict[str, tuple[Array, Array]]
Batch = dict[str, Array]
Tree = Any


@struct.dataclass
class Aux:
    """What a loss returns beside its value.

    Attributes:
      metrics: name -> (sum, count), so that microbatches and hosts add up; the logged value is sum / count.
      variables: the new value of what a step updates without a gradient (same structure as it was given).
    """

    metrics: Metrics
    variables: Tree


@struct.dataclass
class Preview:
    """Pictures for the log, drawn as one labelled grid.

    Attributes:
      images: pictures in reading order.
      columns: pictures in a row.
      labels: one line of text per picture, or token ids that the run's tokenizer turns into one; None for no text.
      written: the ids are of the tokenizer of what the run writes, where that is another one.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    columns: int = struct.field(pytree_node=False)
    labels: tuple[str, ...] | Int[np.ndarray, "n l"] | None = None
    written: bool = struct.field(pytree_node=False, default=False)


@runtime_checkable
class Objective(Protocol):
    """One paper's training problem: a frozen dataclass without state.

    `params[part]` is one network's tree. `frozen[part]` is {"params": tree, "variables": tree} of a network that is
    not trained. `batch` is a dict of arrays with leading dimension B; `batch["index"]` is each example's place in the
    data stream. With a class attribute TAKES_PARTS = True, an objective is given the whole batch also where
    `config.mesh.microbatches` is above 1, and takes it apart itself.

    An objective may have to find out something of the weights that are kept, such as the deviation of their latents:
    it then has a number of examples `measured`, and a method `measure(params, variables, frozen, batch, rng, number)
    -> variables`. Whenever the run saves, that is called with the weights of inference for the first so many examples
    of the stream, in batches whose `number` counts from 0, each with a key of its own. Where a signal ends the run,
    what was found before stays, if the method `has_measured(variables)` says that there is some, of weights some
    updates older; else one batch is seen. With a number `measured_first` it is called once, before the first update of
    a run, for so many examples, unless `has_measured` says that the weights that the run starts from brought it along.
    """

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns (params, variables); traceable, so that shapes are known without memory."""
        ...

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of a batch and its metrics; pure."""
        ...

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Returns pictures for the log, by name."""
        ...


def example_keys(rng: Key[Array, ""], batch: Batch) -> Key[Array, "b"]:
    """One key per example, from the step's key and the example's place in the stream.

    An example's noise is therefore the same however the batch is split over devices, processes or microbatches.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, batch["index"])
