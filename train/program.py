"""What a config becomes on a mesh: networks and state by shape and sharding, and the compiled steps.

Nothing is allocated here and no dataset or run is opened, so that the real step of the largest config can also be
compiled, measured or described where it could not run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from cli.errors import UserError
from data.pipeline import picture_shapes
from train.checks import check_config
from train.distributed.mesh import batch_sharding, check_batch_size, replicated
from train.distributed.sharding import shardings
from train.objectives import create_objective
from train.objectives.contract import Batch, Objective
from train.objectives.lora import PAIR_RULES
from train.optimizer import create_optimizer
from train.precomputed import example_spec
from train.state import TrainState, create_state
from train.step import make_eval_step, make_measure, make_train_step
from train.trainable import trained_params, trained_patterns
from weights import power_averages
from weights.sources import abstract_frozen

Tree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled side of a run. Shapes are ShapeDtypeStructs that carry their shardings.

    Attributes:
      mesh: the devices.
      rows: sharding of a batch: its first dimension over `data` and `fsdp`.
      whole: sharding of what every device holds.
      objective: what is trained.
      init_optimizer: params -> state of the optimizer, which is of the trained ones.
      abstract_state: of the training state.
      abstract_frozen: of the networks that are used and not trained.
      abstract_batch: of a batch.
      init: batch -> TrainState, jitted; parameters are created sharded.
      train_step: (state, frozen, batch) -> (state, metrics, health), jitted; the state is donated.
      eval_step: (state, frozen, batch) -> metrics, jitted.
      measure: (state, frozen, batch, number) -> state, jitted; see `train.objectives.contract`.
    """

    mesh: Mesh
    rows: NamedSharding
    whole: NamedSharding
    objective: Objective
    init_optimizer: Callable[[Tree], Tree]
    abstract_state: TrainState
    abstract_frozen: Tree
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    init: Any
    train_step: Any
    eval_step: Any
    measure: Any

    def in_mesh(self) -> Any:
        """The context in which the steps are to be traced: networks find their mesh in it."""
        return jax.set_mesh(self.mesh)


def create_program(
    config: ConfigDict, mesh: Mesh, example: Mapping[str, tuple[tuple[int, ...], np.dtype]] | None = None
) -> Program:
    """Builds the program of a config whose frozen stages are resolved, or described by the config itself.

    Args:
      config: of the run.
      mesh: the devices.
      example: shape and dtype of each field of an example, where a dataset is at hand; else what the config says of it.

    Raises:
      UserError: if the config itself is impossible (`train.checks`), the networks cannot be built, a rule or
        `config.trainable` does not fit, or the batch does not divide.
    """
    check_config(config)
    objective = create_objective(config)
    check_batch_size(config, mesh)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    abstract_batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in (example or example_spec(config)).items()
    }
    init_rng = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)  # apart from every step's key
    try:
        abstract_params, _ = jax.eval_shape(objective.init, init_rng, abstract_batch)
    except (KeyError, ValueError) as error:  # a field of a network has a value that it does not know
        raise UserError(f"config.models cannot be built: {str(error).splitlines()[0]}") from error
    trained = trained_params(abstract_params, trained_patterns(config))
    optimizer, schedule = create_optimizer(config.optimizer, trained, config.steps, whole=abstract_params)

    def init_optimizer(params: Tree) -> Tree:
        return optimizer.init(trained_params(params, trained_patterns(config)))

    def init(batch: Batch) -> TrainState:
        params, variables = objective.init(init_rng, batch)
        trained = trained_params(params, trained_patterns(config))
        averaged = trained if config.ema.decay > 0 else {}
        averages = power_averages.start(trained, config.ema.lengths, config.ema.paths)
        return create_state(params, variables, init_optimizer(params), averaged, averages)

    def place(tree: Tree) -> Tree:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            shardings(tree, (*PAIR_RULES, *config.mesh.rules), mesh),
        )

    abstract_state = place(jax.eval_shape(init, abstract_batch))
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    program = Program(
        mesh=mesh,
        rows=rows,
        whole=whole,
        objective=objective,
        init_optimizer=init_optimizer,
        abstract_state=abstract_state,
        abstract_frozen=place(abstract_frozen(config)),
        abstract_batch=abstract_batch,
        init=jax.jit(init, out_shardings=state_shardings),
        # The state is donated: its memory is the next state's.
        train_step=jax.jit(
            make_train_step(config, objective, optimizer, schedule),
            donate_argnums=0,
            out_shardings=(state_shardings, whole, whole),
        ),
        eval_step=jax.jit(make_eval_step(config, objective), out_shardings=whole),
        measure=jax.jit(make_measure(config, objective), donate_argnums=0, out_shardings=state_shardings),
    )
    if config.data.buckets:
        _check_buckets(config, program)
        return program
    try:
        with program.in_mesh():  # the trace is kept, so looking for mistakes here costs nothing
            program.train_step.eval_shape(abstract_state, program.abstract_frozen, abstract_batch)
    except ValueError as error:  # an implementation that these devices do not have, for example
        raise UserError(f"this config cannot be trained on these devices: {str(error).splitlines()[0]}") from error
    return program


def _check_buckets(config: ConfigDict, program: Program) -> None:
    """Raises UserError unless the networks take pictures of every shape: each of them is traced."""
    image = program.abstract_batch["image"]
    for shape in picture_shapes(config.data):
        batch = {**program.abstract_batch, "image": image.update(shape=(image.shape[0], *shape, *image.shape[3:]))}
        try:
            with program.in_mesh():
                program.train_step.eval_shape(program.abstract_state, program.abstract_frozen, batch)
        except (ValueError, TypeError, FlaxError) as error:  # what networks of one shape raise
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"config.data.buckets has {shape[0]} x {shape[1]}, which a network of this {config.objective} does not "
                f"take: {reason}; choose other shapes, or a network that takes any"
            ) from error
