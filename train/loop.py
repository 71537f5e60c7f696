"""The one loop: restore, then evaluate, save, take a batch, step, log."""

import contextlib
import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cli.config import flatten
from cli.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from data.pipeline import BatchReader, ExampleStream
from data.tokenizer import Tokenizer
from sample.grid import draw_grid
from train.environment import describe_environment
from train.mesh import batch_sharding, make_mesh, place_batch, process_rows, replicated
from train.metric_writer import MetricLog, ProgressBar, WandbLog, means, save_picture
from train.objectives import create_objective
from train.objectives.contract import Batch, Preview
from train.optimizer import create_optimizer
from train.preemption import StopSignal
from train.sharding import shardings
from train.state import TrainState, create_state
from train.step import make_eval_step, make_train_step
from train.transfer import initialize_parts
from train.workdir import copy_tokenizer, open_workdir, pin_frozen, wandb_id
from weights.checkpoint import CheckpointStore, UnreadableCheckpoint
from weights.run import CHECKPOINTS, DONE, ENVIRONMENT
from weights.sources import load_frozen

Tree = Any


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Trains what `config` says in `workdir`, from its newest checkpoint if it has one.

    Returns:
      EXIT_OK when all steps are done, EXIT_PREEMPTED when a signal ended the run after a save.

    Raises:
      UserError: a mistake in the config, the workdir or a source; the run folder stays as it was.
    """
    workdir = Path(workdir)
    _check_config(config)
    store = CheckpointStore(workdir / CHECKPOINTS, keep=config.checkpoint.keep)
    steps = store.steps()
    with StopSignal() as stop:
        pin_frozen(config, workdir, resuming=bool(steps))
        open_workdir(workdir, config, resuming=bool(steps))
        tokenizer = copy_tokenizer(config, workdir, resuming=bool(steps))
        training = _prepare(config, tokenizer)
        state, start = _restore(training, store, steps)
        if start >= config.steps:
            (workdir / DONE).write_text(f"{start}\n", encoding="utf-8")
            print(f"{workdir} is complete: {start} steps; raise config.steps to train further")
            return EXIT_OK
        (workdir / DONE).unlink(missing_ok=True)
        (workdir / ENVIRONMENT).write_text(json.dumps(describe_environment(), indent=2) + "\n", encoding="utf-8")
        return _run(config, workdir, training, store, state, start, stop)


@dataclasses.dataclass(frozen=True)
class _Training:
    """What the loop needs beside the state."""

    mesh: jax.sharding.Mesh
    objective: Any
    stream: ExampleStream
    tokenizer: Tokenizer | None
    frozen: Tree
    train_step: Any
    eval_step: Any
    initialize: Any
    abstract_state: TrainState
    validation: Callable[[], Iterator[Batch]]
    preview_batch: Batch


def _prepare(config: ConfigDict, tokenizer: Tokenizer | None) -> _Training:
    """Builds everything that does not change during a run; parameters are known by shape only."""
    _check_parts(config, tokenizer)
    mesh = make_mesh(config.mesh)
    rows_sharding, whole = batch_sharding(mesh), replicated(mesh)
    objective = create_objective(config)
    stream = ExampleStream(config.data, tokenizer, split=config.data.split, seed=config.seed, train=True)
    frozen = load_frozen(config, config.seed)
    frozen = jax.device_put(frozen, shardings(frozen, config.mesh.rules, mesh))

    example = stream.batch([0])
    abstract_batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *value.shape[1:]), value.dtype)
        for name, value in example.items()
    }
    init_rng = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)  # apart from every step's key
    try:
        abstract_params, _ = jax.eval_shape(objective.init, init_rng, abstract_batch)
    except (KeyError, ValueError) as error:  # a field of a network has a value that it does not know
        raise UserError(f"config.models cannot be built: {str(error).splitlines()[0]}") from error
    optimizer, schedule = create_optimizer(config.optimizer, abstract_params, config.steps)

    def init(batch: Batch) -> TrainState:
        params, variables = objective.init(init_rng, batch)
        return create_state(params, variables, optimizer.init(params), ema=config.ema.decay > 0)

    abstract_state = jax.eval_shape(init, abstract_batch)
    state_shardings = shardings(abstract_state, config.mesh.rules, mesh)
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state,
        state_shardings,
    )

    def initialize() -> TrainState:
        rows = process_rows(rows_sharding, config.batch_size)
        batch = place_batch(stream.batch(rows), rows, config.batch_size, rows_sharding)
        state = jax.jit(init, out_shardings=state_shardings)(batch)
        return initialize_parts(config, state, optimizer)

    validation_stream = ExampleStream(
        config.data, tokenizer, split=config.data.validation_split, seed=config.seed, train=False
    )
    rows = process_rows(rows_sharding, config.batch_size)

    def validation() -> Iterator[Batch]:
        for number in range(min(config.evaluate.batches, max(1, validation_stream.epoch_size // config.batch_size))):
            batch = validation_stream.batch([number * config.batch_size + row for row in rows])
            yield place_batch(batch, rows, config.batch_size, rows_sharding)

    preview_batch = jax.device_put(validation_stream.batch(range(config.evaluate.previews)), whole)
    return _Training(
        mesh=mesh,
        objective=objective,
        stream=stream,
        tokenizer=tokenizer,
        frozen=frozen,
        # The state is donated: its memory is the next state's.
        train_step=jax.jit(
            make_train_step(config, objective, optimizer, schedule),
            donate_argnums=0,
            out_shardings=(state_shardings, whole),
        ),
        eval_step=jax.jit(make_eval_step(config, objective), out_shardings=whole),
        initialize=initialize,
        abstract_state=abstract_state,
        validation=validation,
        preview_batch=preview_batch,
    )


def _check_parts(config: ConfigDict, tokenizer: Tokenizer | None) -> None:
    """Raises UserError where the sizes of networks, data and tokenizer disagree."""
    for group in ("models", "frozen"):
        for part, model in config[group].items():
            for key in ("text_length", "image_size"):
                if key in model and model[key] != config.data[key]:
                    raise UserError(
                        f"config.{group}.{part}.{key} is {model[key]}, but config.data.{key} is {config.data[key]}; "
                        "they must be equal"
                    )
            if tokenizer is not None and model.get("text_vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
                raise UserError(
                    f"config.{group}.{part}.text_vocab_size is {model.text_vocab_size}, but the tokenizer has "
                    f"{tokenizer.vocab_size} ids; set it to at least that"
                )


def _restore(training: _Training, store: CheckpointStore, steps: Sequence[int]) -> tuple[TrainState, int]:
    """Reads the newest checkpoint that can be read, or makes a new state."""
    for step in steps:
        try:
            trees = store.restore(step, training.abstract_state.as_trees())
        except UnreadableCheckpoint as error:
            if step == steps[-1]:
                raise
            print(f"warning: {error}; the one before it is used", flush=True)
            shutil.move(store.folder / str(step), store.folder / f"{step}.unreadable")
            continue
        return TrainState.from_trees(trees), step
    return training.initialize(), 0


def _run(
    config: ConfigDict,
    workdir: Path,
    training: _Training,
    store: CheckpointStore,
    state: TrainState,
    start: int,
    stop: StopSignal,
) -> int:
    """Trains from step `start`."""
    rows_sharding = batch_sharding(training.mesh)
    rows = process_rows(rows_sharding, config.batch_size)
    step, metrics, pending, clock = start, {}, None, (time.monotonic(), start)
    with contextlib.ExitStack() as resources:
        # Closed in reverse order, also when a step fails: a checkpoint that is being written is finished first.
        log = resources.enter_context(contextlib.closing(MetricLog(workdir, start)))
        wandb = WandbLog(config.wandb, workdir, wandb_id(workdir), flatten(config))
        resources.callback(wandb.close)
        bar = resources.enter_context(contextlib.closing(ProgressBar(config.steps, start, workdir.name)))
        reader = BatchReader(
            training.stream,
            batch_size=config.batch_size,
            rows=rows,
            examples_seen=int(state.examples_seen),
            workers=config.data.workers,
            read_ahead=config.data.read_ahead,
        )
        resources.callback(reader.close)
        resources.callback(store.close)
        bar.say(f"{'continuing at' if start else 'starting from'} step {start} of {config.steps} in {workdir}")

        def evaluate(step: int) -> None:
            values = _evaluate(training, state)
            log.write(step, values)
            pictures = _previews(config, training, state)
            for name, picture in pictures.items():
                save_picture(workdir, step, name, picture)
            wandb.write(step, {**values, **{f"samples/{name}": picture for name, picture in pictures.items()}})

        # ORDER OF EVENTS. Evaluation and saving come before the next batch is taken, so a checkpoint of step k says
        # all about step k: its rows are in the log, and the data stream goes on at its `examples_seen`. On resume at
        # k both have been done. The metrics of an update are read one update later, while the device works on the
        # next.
        while True:
            last = step == config.steps
            evaluation_due = (step > start or start == 0) and (last or step % config.evaluate.every == 0)
            save_due = step > start and (last or stop.name or step % config.checkpoint.every == 0)
            if evaluation_due or save_due:
                pending, clock = _flush(pending, config, log, wandb, bar, clock)
                if step > start:
                    _require_finite(step, means(jax.device_get(metrics)))
            if evaluation_due:
                evaluate(step)
            if save_due:
                store.save(step, state.as_trees())
            if evaluation_due or save_due:
                clock = (time.monotonic(), step)  # a rate is of training alone
            if last or stop.name:
                break
            batch = place_batch(next(reader), rows, config.batch_size, rows_sharding)
            state, metrics = training.train_step(state, training.frozen, batch)
            step += 1
            previous, pending = pending, None
            _, clock = _flush(previous, config, log, wandb, bar, clock)
            if step % config.log.every == 0 or step == config.steps:
                pending = (step, metrics)

    if training.stream.truncated or training.stream.source.damaged:
        damaged = len(training.stream.source.damaged)
        print(f"captions truncated: {training.stream.truncated}; records damaged: {damaged}")
    if step < config.steps:
        saved = f"saved step {step}" if step else "nothing to save yet"
        print(f"{stop.name}: {saved}; continue with: {shlex.join(_command())}", file=sys.stderr, flush=True)
        return EXIT_PREEMPTED
    (workdir / DONE).write_text(f"{step}\n", encoding="utf-8")
    print(f"done: {step} steps, {workdir}")
    return EXIT_OK


def _flush(
    pending: tuple[int, Any] | None,
    config: ConfigDict,
    log: MetricLog,
    wandb: WandbLog,
    bar: ProgressBar,
    clock: tuple[float, int],
) -> tuple[None, tuple[float, int]]:
    """Writes the metrics of an update, if one waits to be written.

    Raises:
      UserError: if its loss is not finite; the last checkpoint is intact.
    """
    if pending is None:
        return None, clock
    step, metrics = pending
    values = means(jax.device_get(metrics))
    now = time.monotonic()
    seconds, steps = now - clock[0], step - clock[1]
    _require_finite(step, values)
    rate = {
        "time/now": time.time(),
        "time/examples_per_second": steps * config.batch_size / max(seconds, 1e-9),
    }
    log.write(step, {**values, **rate})
    wandb.write(step, {**values, **rate})
    bar.update(step, values)
    return None, (now, step)


def _require_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises UserError if an update's loss or gradient is not finite; nothing of it is saved."""
    if not np.isfinite(values["loss"]) or not np.isfinite(values["gradient_norm"]):
        raise UserError(
            f"step {step}: the loss is {values['loss']} and the gradient norm {values['gradient_norm']}; "
            "lower the learning rate or the clip norm; the last checkpoint is intact"
        )


def _evaluate(training: _Training, state: TrainState) -> dict[str, float]:
    """Mean metrics over the validation batches, named `validation/...`."""
    totals: dict[str, tuple[Any, Any]] = {}
    for batch in training.validation():
        for name, pair in jax.device_get(training.eval_step(state, training.frozen, batch)).items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + pair[0], before[1] + pair[1])
    return {f"validation/{name}": value for name, value in means(totals).items()}


def _previews(config: ConfigDict, training: _Training, state: TrainState) -> dict[str, Any]:
    """The objective's previews as pictures; every process computes them, and process 0 keeps them."""
    rng = jax.random.key(config.seed)
    previews = training.objective.preview(
        state.inference_params, state.variables, training.frozen, training.preview_batch, rng
    )
    if jax.process_index():
        return {}
    return {name: _draw(preview, training.tokenizer) for name, preview in previews.items()}


def _draw(preview: Preview, tokenizer: Tokenizer | None) -> Any:
    labels = preview.labels
    if labels is not None and not isinstance(labels, tuple):
        labels = tuple(tokenizer.decode(ids) for ids in labels) if tokenizer is not None else None
    return draw_grid(preview.images, columns=preview.columns, labels=labels)


def _check_config(config: ConfigDict) -> None:
    """Finds what would otherwise fail late."""
    for key in ("steps", "batch_size"):
        if config[key] < 1:
            raise UserError(f"config.{key} must be at least 1, not {config[key]}")
    if config.seed < 0:
        raise UserError(f"config.seed must not be negative, not {config.seed}")
    if config.evaluate.previews < 1:
        raise UserError(f"config.evaluate.previews must be at least 1, not {config.evaluate.previews}")
    if jax.process_count() > 1:
        raise UserError("training over several processes is not there yet; start one process, with all its devices")
    for group in ("log", "evaluate", "checkpoint", "ema"):
        if config[group].every < 1:
            raise UserError(f"config.{group}.every must be at least 1, not {config[group].every}")
    if config.steps * config.batch_size >= 2**31:
        raise UserError("config.steps * config.batch_size must stay below 2^31, the largest example number")


def _command() -> list[str]:
    return ["python", *sys.orig_argv[1:]]
