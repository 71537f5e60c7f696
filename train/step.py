"""One update, and one evaluation of a batch: pure functions to be jitted by the program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array
from ml_collections import ConfigDict

from models.layers.partitioning import split_rows
from train.objectives.contract import Batch, Metrics, Objective
from train.optimizer import Schedule, apply_bounds, update_ema
from train.state import TrainState, add_examples
from train.trainable import trained_params, trained_patterns
from weights import power_averages
from weights.run import overlay

Tree = Any


@struct.dataclass
class Health:
    """Whether an update was finite, and where it was not.

    Attributes:
      loss: float32 [], of the batch.
      leaf_norms: float32 [n], norm of the gradient of each trained parameter, in the order of
        `jax.tree.leaves(trained_params(params, trained_patterns(config)))`.
      applied: bool [], False if the update was not finite and was left out (`config.nonfinite` = "skip").
    """

    loss: Any
    leaf_norms: Any
    applied: Any


TrainStep = Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics, Health]]
EvalStep = Callable[[TrainState, Tree, Batch], Metrics]


def make_train_step(
    config: ConfigDict,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
) -> TrainStep:
    """Returns `step(state, frozen, batch) -> (state, metrics, health)`.

    Randomness is `fold_in(key(config.seed), state.step)`: nothing is stored, and a resumed run repeats it exactly.

    With `config.mesh.microbatches` above 1 the gradient is the mean of those of so many parts of the batch, taken in
    turn. That is the gradient of the whole batch for every loss that is a mean over examples. It is not for what the
    examples of a batch decide together, such as a codebook moved by their codes: each part then stands alone. An
    objective with `TAKES_PARTS` is given the whole batch, and takes its parts itself.

    Gradients are of `config.trainable`, and all other parameters leave a step as they entered it. `variables` follow
    the objective, also those of a module whose parameters are held: running statistics go on.

    An update that is skipped leaves everything as it was but `step` and `examples_seen`: the optimizer's own count,
    which its schedule follows, stays, so that the schedule lags the logged step by the updates skipped.

    Args:
      config: of the run.
      objective: gives the loss.
      optimizer: of the trained parameters.
      schedule: learning rate, for the log.
    """
    microbatches = 1 if getattr(objective, "TAKES_PARTS", False) else config.mesh.microbatches

    def train_step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics, Health]:
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        trained = trained_params(state.params, trained_patterns(config))

        def loss_of(trained: Tree, variables: Tree, batch: Batch) -> tuple[Array, Any]:
            params = overlay(state.params, trained)
            return objective.loss(params, variables, frozen, batch, rng, state.step, True)

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        if microbatches == 1:
            (loss, aux), gradients = gradient_of(trained, state.variables, batch)
            metrics, variables = aux.metrics, aux.variables
        else:
            gradient_of = functools.partial(gradient_of, trained)
            loss, metrics, variables, gradients = _accumulate(gradient_of, state.variables, batch, microbatches)

        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        trained = apply_bounds(config.optimizer, optax.apply_updates(trained, updates))
        step = state.step + 1
        ema = state.ema_params
        if jax.tree.leaves(ema):
            ema = update_ema(config.ema, ema, trained, step)
        new = TrainState(
            step=step,
            examples_seen=add_examples(state.examples_seen, batch["index"].shape[0]),
            params=overlay(state.params, trained),
            variables=variables,
            ema_params=ema,
            opt_state=opt_state,
            averages=power_averages.update(state.averages, trained, step),
        )

        leaf_norms = jnp.stack([optax.tree.norm(gradient) for gradient in jax.tree.leaves(gradients)])
        norm = jnp.sqrt(jnp.sum(jnp.square(leaf_norms)))
        applied = jnp.ones((), bool)
        if config.nonfinite == "skip":
            applied = jnp.isfinite(loss) & jnp.isfinite(norm)
            kept = dataclasses.replace(state, step=new.step, examples_seen=new.examples_seen)
            new = jax.tree.map(lambda after, before: jnp.where(applied, after, before), new, kept)
        one = jnp.ones((), jnp.int32)
        metrics = {
            **metrics,
            "gradient_norm": (norm, one),
            "learning_rate": (jnp.asarray(schedule(state.step), jnp.float32), one),
        }
        return new, metrics, Health(loss=loss, leaf_norms=leaf_norms, applied=applied)

    return train_step


def make_eval_step(config: ConfigDict, objective: Objective) -> EvalStep:
    """Returns `step(state, frozen, batch) -> metrics`, with the weights that inference uses."""

    def eval_step(state: TrainState, frozen: Tree, batch: Batch) -> Metrics:
        rng = jax.random.key(config.seed)
        _, aux = objective.loss(state.inference_params, state.variables, frozen, batch, rng, state.step, False)
        return aux.metrics

    return eval_step


def make_measure(config: ConfigDict, objective: Any) -> Callable[[TrainState, Tree, Batch, Array], TrainState]:
    """Returns `measure(state, frozen, batch, number) -> state`, of an objective that has a `measure`."""

    def measure(state: TrainState, frozen: Tree, batch: Batch, number: Array) -> TrainState:
        rng = jax.random.fold_in(jax.random.key(config.seed), number)
        params = state.inference_params
        variables = objective.measure(params, state.variables, frozen, batch, rng, number)
        return dataclasses.replace(state, variables=variables)

    return measure


def _accumulate(
    gradient_of: Callable[..., Any], variables: Tree, batch: Batch, count: int
) -> tuple[Array, Metrics, Tree, Tree]:
    """Mean loss and gradients, summed metrics, and the last variables of `count` microbatches in turn.

    `gradient_of(variables, batch)` gives ((loss, aux), gradients).
    """

    def values_of(variables: Tree, microbatch: Batch) -> tuple[Any, Tree]:
        (loss, aux), gradients = gradient_of(variables, microbatch)
        return (loss, aux.metrics, gradients), aux.variables

    def add(carry: tuple[Any, Tree], microbatch: Batch) -> tuple[tuple[Any, Tree], None]:
        sums, variables = carry
        values, variables = values_of(variables, microbatch)
        return (jax.tree.map(jnp.add, sums, values), variables), None

    parts = jax.tree.map(lambda value: split_rows(value, count), batch)
    first = jax.tree.map(lambda value: value[0], parts)
    shapes, _ = jax.eval_shape(values_of, variables, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((loss, metrics, gradients), variables), _ = jax.lax.scan(add, (zeros, variables), parts)
    return loss / count, metrics, variables, jax.tree.map(lambda gradient: gradient / count, gradients)
