"""The one loop: restore, then evaluate, save, take a batch, step, log."""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cli.config import flatten, from_json, to_json
from cli.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from data.pipeline import BatchReader, ExampleStream, dataset_folder, load_tokenizer
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
from weights.checkpoint import CheckpointStore
from weights.run import CHECKPOINTS, CONFIG, DONE, ENVIRONMENT, TOKENIZER
from weights.sources import load_frozen, resolve_frozen

Tree = Any

# What may change between the starts of one run: nothing that an update depends on, but for its length and batch size.
CHANGEABLE = ("steps", "batch_size", "mesh.", "log.", "checkpoint.", "wandb.", "data.workers", "data.data_dir")


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Trains what `config` says in `workdir`, from its newest checkpoint if it has one.

    Returns:
      EXIT_OK when all steps are done, EXIT_PREEMPTED when a signal ended the run after a save.

    Raises:
      UserError: a mistake in the config, the workdir or a source; the run folder stays as it was.
    """
    workdir = Path(workdir)
    _check_config(config)
    resolve_frozen(config, near=workdir)
    store = CheckpointStore(workdir / CHECKPOINTS, keep=config.checkpoint.keep)
    steps = store.steps()
    _open_workdir(workdir, config, resuming=bool(steps))
    tokenizer = _copy_tokenizer(config, workdir)
    training = _prepare(config, tokenizer)

    state, start = _restore(training, store, steps)
    if start == config.steps and (workdir / DONE).is_file():
        print(f"{workdir} is complete: {start} steps; raise config.steps to train further")
        return EXIT_OK
    (workdir / DONE).unlink(missing_ok=True)
    (workdir / ENVIRONMENT).write_text(json.dumps(describe_environment(), indent=2) + "\n", encoding="utf-8")
    return _run(config, workdir, training, store, state, start)


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
    validation: Sequence[Batch]
    preview_batch: Batch


def _prepare(config: ConfigDict, tokenizer: Tokenizer | None) -> _Training:
    """Builds everything that does not change during a run; parameters are known by shape only."""
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
    abstract_params, _ = jax.eval_shape(objective.init, init_rng, abstract_batch)
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
    count = min(config.evaluate.batches, max(1, validation_stream.epoch_size // config.batch_size))
    validation = [
        place_batch(
            validation_stream.batch([number * config.batch_size + row for row in rows]),
            rows,
            config.batch_size,
            rows_sharding,
        )
        for number in range(count)
    ]
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


def _restore(training: _Training, store: CheckpointStore, steps: Sequence[int]) -> tuple[TrainState, int]:
    """Reads the newest checkpoint that can be read, or makes a new state."""
    for step in steps:
        try:
            trees = store.restore(step, training.abstract_state.as_trees())
        except UserError as error:
            if "cannot be read" not in str(error) or step == steps[-1]:
                raise
            print(f"warning: {error}; the one before it is used", flush=True)
            shutil.move(store.folder / str(step), store.folder / f"{step}.unreadable")
            continue
        return TrainState.from_trees(trees), step
    return training.initialize(), 0


def _run(
    config: ConfigDict, workdir: Path, training: _Training, store: CheckpointStore, state: TrainState, start: int
) -> int:
    """Trains from step `start`."""
    rows_sharding = batch_sharding(training.mesh)
    rows = process_rows(rows_sharding, config.batch_size)
    reader = BatchReader(
        training.stream,
        batch_size=config.batch_size,
        rows=rows,
        examples_seen=int(state.examples_seen),
        workers=config.data.workers,
        read_ahead=config.data.read_ahead,
    )
    log = MetricLog(workdir, start)
    wandb = WandbLog(config.wandb, workdir, _wandb_id(workdir), flatten(config))
    bar = ProgressBar(config.steps, start, workdir.name)
    bar.say(f"{'continuing at' if start else 'starting from'} step {start} of {config.steps} in {workdir}")

    def evaluate(step: int) -> None:
        values = _evaluate(training, state)
        if values:
            log.write(step, values)
        pictures = _previews(config, training, state)
        for name, picture in pictures.items():
            save_picture(workdir, step, name, picture)
        wandb.write(step, {**values, **{f"samples/{name}": picture for name, picture in pictures.items()}})

    # ORDER OF EVENTS. Evaluation and saving come before the next batch is taken, so a checkpoint of step k says all
    # about step k: its rows are in the log, and the data stream goes on at its `examples_seen`. On resume at k both
    # have been done. The metrics of an update are read one update later, while the device works on the next.
    step, pending, clock = start, None, (time.monotonic(), start)
    with StopSignal() as stop:
        while True:
            due = step != start or start == 0
            last = step == config.steps
            if due and (last or step % config.evaluate.every == 0):
                pending, clock = _flush(pending, config, log, wandb, bar, clock)
                evaluate(step)
            save_due = due and step > 0 and (last or step % config.checkpoint.every == 0)
            if save_due or (stop.name and step > start):
                pending, clock = _flush(pending, config, log, wandb, bar, clock)
                store.save(step, state.as_trees())
            if last or stop.name:
                break
            batch = place_batch(next(reader), rows, config.batch_size, rows_sharding)
            state, metrics = training.train_step(state, training.frozen, batch)
            step += 1
            previous, pending = pending, None
            _, clock = _flush(previous, config, log, wandb, bar, clock)
            if step % config.log.every == 0 or step == config.steps:
                pending = (step, metrics)

    reader.close()
    store.close()
    log.close()
    wandb.close()
    bar.close()
    if training.stream.truncated or training.stream.source.damaged:
        print(
            f"captions truncated: {training.stream.truncated}; records damaged: {len(training.stream.source.damaged)}"
        )
    if step < config.steps:
        print(f"{stop.name}: saved step {step}; continue with: {' '.join(_command())}", file=sys.stderr, flush=True)
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
    if not np.isfinite(values["loss"]) or not np.isfinite(values["gradient_norm"]):
        raise UserError(
            f"step {step}: the loss is {values['loss']} and the gradient norm {values['gradient_norm']}; "
            "lower the learning rate or the clip norm; the last checkpoint is intact"
        )
    rate = {
        "time/now": time.time(),
        "time/examples_per_second": steps * config.batch_size / max(seconds, 1e-9),
    }
    log.write(step, {**values, **rate})
    wandb.write(step, {**values, **rate})
    bar.update(step, values)
    return None, (now, step)


def _evaluate(training: _Training, state: TrainState) -> dict[str, float]:
    """Mean metrics over the validation batches, named `validation/...`."""
    totals: dict[str, tuple[Any, Any]] = {}
    for batch in training.validation:
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
    for group in ("log", "evaluate", "checkpoint", "ema"):
        if config[group].every < 1:
            raise UserError(f"config.{group}.every must be at least 1, not {config[group].every}")
    if config.steps * config.batch_size >= 2**31:
        raise UserError("config.steps * config.batch_size must stay below 2^31, the largest example number")


def _open_workdir(workdir: Path, config: ConfigDict, resuming: bool) -> None:
    """Makes the run folder, or checks that it belongs to this config."""
    path = workdir / CONFIG
    if resuming and path.is_file():
        before, now = flatten(from_json(path.read_text(encoding="utf-8"))), flatten(config)
        changed = sorted(
            key
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key) and not key.startswith(CHANGEABLE)
        )
        if changed:
            shown = ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
            raise UserError(f"{workdir} was started with another config ({shown}); use a new --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(to_json(config), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the workdir {workdir}: {error.strerror}; choose another --workdir") from error


def _copy_tokenizer(config: ConfigDict, workdir: Path) -> Tokenizer | None:
    """Copies the dataset's tokenizer into the run, for configs with text."""
    if not config.data.text_length:
        return None
    own = workdir / TOKENIZER
    if not own.is_file():
        load_tokenizer(config.data.dataset, config.data.data_dir)
        shutil.copyfile(dataset_folder(config.data.dataset, config.data.data_dir) / TOKENIZER, own)
    return Tokenizer.load(own)


def _wandb_id(workdir: Path) -> str:
    """An id that stays with the run folder."""
    path = workdir / "wandb" / "id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(os.urandom(4).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _command() -> list[str]:
    return ["python", *sys.orig_argv[1:]]
