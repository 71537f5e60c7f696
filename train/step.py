"""One update, and one evaluation of a batch: pure functions to be jitted by the loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from train.objectives.contract import Batch, Metrics, Objective
from train.optimizer import Schedule, apply_bounds, update_ema
from train.state import TrainState

Tree = Any
TrainStep = Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Tree, Batch], Metrics]


def make_train_step(
    config: ConfigDict, objective: Objective, optimizer: optax.GradientTransformation, schedule: Schedule
) -> TrainStep:
    """Returns `step(state, frozen, batch) -> (state, metrics)`.

    Randomness is `fold_in(key(config.seed), state.step)`: nothing is stored, and a resumed run repeats it exactly.
    """

    def train_step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss_of(params: Tree) -> tuple[Array, Any]:
            return objective.loss(params, state.variables, frozen, batch, rng, state.step, True)

        (_, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = apply_bounds(config.optimizer, optax.apply_updates(state.params, updates))
        step = state.step + 1
        ema = state.ema_params
        if jax.tree.leaves(ema):
            ema = update_ema(config.ema, ema, params, step)
        examples_seen = state.examples_seen + batch["index"].shape[0]
        one = jnp.ones((), jnp.int32)
        metrics = {
            **aux.metrics,
            "gradient_norm": (optax.tree.norm(gradients), one),
            "examples_seen": (examples_seen, one),
            "learning_rate": (jnp.asarray(schedule(state.step), jnp.float32), one),
        }
        state = TrainState(
            step=step,
            examples_seen=examples_seen,
            params=params,
            variables=aux.variables,
            ema_params=ema,
            opt_state=opt_state,
        )
        return state, metrics

    return train_step


def make_eval_step(config: ConfigDict, objective: Objective) -> EvalStep:
    """Returns `step(state, frozen, batch) -> metrics`, with the weights that inference uses."""

    def eval_step(state: TrainState, frozen: Tree, batch: Batch) -> Metrics:
        rng = jax.random.key(config.seed)
        _, aux = objective.loss(state.inference_params, state.variables, frozen, batch, rng, state.step, False)
        return aux.metrics

    return eval_step
