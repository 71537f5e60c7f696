"""The one loop: restore, then evaluate, save, take a batch, step, log."""

import contextlib
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import StepTraceAnnotation, TraceAnnotation
from ml_collections import ConfigDict

from cli.config import from_json, to_json
from cli.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from cli.locations import Location, locate
from cli.plurals import spell_count
from data.batch_reader import BatchReader
from data.pipeline import Stream, open_stream
from data.tokenizer import Tokenizer
from sample.sheets.grid import draw_grid
from train.checks import check_classes, check_config, check_parts, check_profile, check_starts, check_whole_batches
from train.distributed.mesh import make_mesh, place_batch, process_rows
from train.distributed.preemption import StopSignal
from train.distributed.processes import all_agree, from_first, is_first
from train.environment import describe_environment
from train.health import HealthCheck
from train.metric_writer import RunLog, SilentLog, means
from train.objectives.contract import Batch, Preview
from train.precomputed import locate_precomputed
from train.program import Program, create_program
from train.state import TrainState, count_examples
from train.step_profile import StepProfile
from train.trainable import describe_held, trained_params, trained_patterns
from train.transfer import initialize_parts, with_bases, without_bases
from train.unread import unread_keys
from train.workdir import copy_tokenizers, open_workdir, pin_sources, storage_errors, wandb_id
from weights.checkpoint import CheckpointStore, UnreadableCheckpoint
from weights.power_averages import AVERAGES
from weights.run import CHECKPOINTS, CONFIG, DONE, ENVIRONMENT, PROFILE, TOKENIZER, WRITES_WITH, read_metrics
from weights.sources import load_frozen
from weights.starts import starts_of

Tree = Any


def train(config: ConfigDict, workdir: str | Location, profile: int = 0) -> int:
    """Trains what `config` says in `workdir`, from its newest checkpoint if it has one.

    To be called by every process of a run alike; they share the folder.

    Args:
      config: see `configs.common`.
      workdir: the run folder, here or in a store.
      profile: how many updates process 0 traces, see `train.step_profile`; 0 for none. They stay the same updates.

    Returns:
      EXIT_OK when all steps are done, EXIT_PREEMPTED when a signal ended the run after a save.

    Raises:
      UserError: a mistake in the config, the workdir or a source; the run folder stays as it was.
    """
    workdir = locate(workdir)
    check_config(config)
    check_profile(profile, config)
    with StopSignal() as stop, storage_errors(workdir):
        store = CheckpointStore(workdir / CHECKPOINTS, keep=config.checkpoint.keep)
        config, steps = _open(config, workdir, store)
        tokenizer = Tokenizer.load(workdir / TOKENIZER) if config.data.text_length else None
        writer = Tokenizer.load(workdir / WRITES_WITH) if (workdir / WRITES_WITH).is_file() else None
        for line in unread_keys(config) if is_first() else ():
            print(f"warning: {line}", flush=True)
        training = _prepare(config, tokenizer, writer)
        state, start = _restore(config, training, store, steps)
        _complete_snapshots(workdir, state, start)
        check_whole_batches(config, count_examples(state.examples_seen))
        unseen = from_first(lambda: not _has_evaluation(workdir, start))
        if start > config.steps or (start == config.steps and not unseen):
            if is_first():
                (workdir / DONE).write_text(f"{start}\n", encoding="utf-8")
                print(f"{workdir} is complete: {spell_count(start, 'step')}; raise config.steps to train further")
            return EXIT_OK
        if is_first():
            (workdir / DONE).unlink(missing_ok=True)
            (workdir / ENVIRONMENT).write_text(json.dumps(describe_environment(), indent=2) + "\n", encoding="utf-8")
        return _run(config, workdir, training, store, state, start, stop, profile, unseen)


def _open(config: ConfigDict, workdir: Location, store: CheckpointStore) -> tuple[ConfigDict, list[int]]:
    """Makes or checks the run folder; every process gets the config as process 0 stored it, and the checkpoints."""

    def prepare() -> tuple[str, list[int]]:
        with storage_errors(workdir):
            steps = store.steps()
            for name in store.unfinished():
                print(f"warning: {store.folder / name} was not finished when the run ended; it is not used", flush=True)
            pin_sources(config, workdir, resuming=bool(steps))
            if not steps:
                check_starts(config)
            open_workdir(workdir, config, resuming=bool(steps))
            copy_tokenizers(config, workdir, resuming=bool(steps))
            return to_json(config), steps

    text, steps = from_first(prepare)
    if not all_agree((workdir / CONFIG).is_file()):
        raise UserError(f"{workdir} is not the same folder on every process; give a --workdir that they all share")
    return from_json(text), steps


@dataclasses.dataclass(frozen=True)
class _Training:
    """What the loop needs beside the state."""

    program: Program
    stream: Stream
    tokenizer: Tokenizer | None
    writer: Tokenizer | None  # of what is written, where that has another vocabulary
    rows: list[int]
    frozen: Tree
    validation: Callable[[], Iterator[Batch]]
    preview_batch: Batch


def _prepare(config: ConfigDict, tokenizer: Tokenizer | None, writer: Tokenizer | None) -> _Training:
    """Builds everything that does not change during a run; parameters are known by shape only."""
    check_parts(config, tokenizer, writer)
    config = locate_precomputed(config, tokenizer)
    opening: dict[str, Any] = {"seed": config.seed, "batch_size": config.batch_size}
    opening |= {"writer": writer} if config.data.get("writes_with", "") else {}
    stream = open_stream(config.data, tokenizer, split=config.data.split, train=True, **opening)
    check_classes(config, stream)
    for line in getattr(stream, "given_up", ()) if is_first() else ():
        print(line, flush=True)
    example = {name: (value.shape[1:], value.dtype) for name, value in stream.batch([0]).items()}
    program = create_program(config, make_mesh(config.mesh), example)
    validation_stream = open_stream(config.data, tokenizer, split=config.data.validation_split, train=False, **opening)
    size, rows = config.batch_size, process_rows(program.rows, config.batch_size)
    if validation_stream.epoch_size < size and is_first():
        has = spell_count(validation_stream.epoch_size, "record")
        print(
            f"warning: {config.data.validation_split} has {has}, fewer than a batch "
            f"of {size}; they repeat, which a loss that compares the examples of a batch takes for mistakes",
            flush=True,
        )

    def validation() -> Iterator[Batch]:
        for number in range(min(config.evaluate.batches, validation_stream.pass_batches(size))):
            batch = validation_stream.batch([number * size + row for row in rows])
            yield place_batch(batch, rows, size, program.rows)

    # Pictures of one batch have one shape.
    previews = range(min(config.evaluate.previews, size) if config.data.buckets else config.evaluate.previews)
    return _Training(
        program=program,
        stream=stream,
        tokenizer=tokenizer,
        writer=writer,
        rows=rows,
        frozen=load_frozen(config, config.seed, program.abstract_frozen),
        validation=validation,
        preview_batch=place_batch(validation_stream.batch(previews), previews, len(previews), program.whole),
    )


def _restore(
    config: ConfigDict, training: _Training, store: CheckpointStore, steps: list[int]
) -> tuple[TrainState, int]:
    """Reads the newest checkpoint that every process can read, or makes a new state."""
    program = training.program
    whole = program.abstract_state.as_trees()
    abstract = without_bases(config, whole)
    damaged: list[int] = []
    for step in steps:
        problem, trees = "another process cannot read it", None
        try:
            store.check(step, abstract)
        except UnreadableCheckpoint as error:
            problem = str(error)
            fine = False
        else:
            fine = True
        # Reading is collective: they begin it together or not at all.
        if all_agree(fine):
            try:
                trees = store.restore(step, abstract)
            except UnreadableCheckpoint as error:
                problem = str(error)
                if jax.process_count() > 1:  # the others may be waiting inside: only a new start can go on
                    store.set_aside(step)
                    raise UserError(f"{problem}; it was set aside, start the same command again") from error
        if trees is not None:
            for number in damaged if is_first() else ():
                store.set_aside(number)
            return TrainState.from_trees(with_bases(config, trees, whole)), step
        damaged.append(step)
        if step == steps[-1]:
            raise UnreadableCheckpoint(f"{problem}; no older one is left")
        if is_first():
            print(f"warning: {problem}; the one before it is used", flush=True)
    batch = training.stream.batch(training.rows)
    with program.in_mesh():
        state = program.init(place_batch(batch, training.rows, config.batch_size, program.rows))
    return initialize_parts(config, state, program.init_optimizer), 0


def _complete_snapshots(workdir: Location, state: TrainState, start: int) -> None:
    """Makes the averages that are kept those of the run until `start`: a kill may have come between them and it."""
    snapshots = CheckpointStore(workdir / AVERAGES)

    def missing() -> bool:
        with storage_errors(workdir):
            snapshots.remove_after(start)
            return start > 0 and start not in snapshots.steps()

    if from_first(missing) and state.averages:  # saving is collective
        snapshots.save(start, {AVERAGES: state.averages})
        snapshots.close()


def _run(
    config: ConfigDict,
    workdir: Location,
    training: _Training,
    store: CheckpointStore,
    state: TrainState,
    start: int,
    stop: StopSignal,
    profile: int,
    unseen: bool,
) -> int:
    """Trains from step `start`, whose evaluation the log lacks if it is `unseen`, and traces `profile` updates."""
    program, rows = training.program, training.rows
    step, pending, clock = start, None, _Clock(config.batch_size, start)
    seen = count_examples(state.examples_seen)
    with contextlib.ExitStack() as resources:
        # Closed in reverse order, also when a step fails: a checkpoint that is being written is finished first.
        log = RunLog(config, workdir, start, wandb_id(workdir)) if is_first() else SilentLog()
        resources.callback(log.close)
        health = HealthCheck(config.nonfinite, trained_params(state.params, trained_patterns(config)), log.say)
        reader = _reader(config, training, seen)
        resources.callback(reader.close)
        trace = StepProfile(workdir / PROFILE, profile if is_first() else 0, start, config.steps, log.say)
        resources.callback(trace.close)
        resources.callback(store.close)
        snapshots = CheckpointStore(workdir / AVERAGES)  # all stay: other averages are made of them
        resources.callback(snapshots.close)
        log.say(f"{'continuing at' if start else 'starting from'} step {start} of {config.steps} in {workdir}")
        for line in describe_held(config, state.params):
            log.say(line)
        if not start and not stop.noted:
            state = _measure_first(config, training, state, log.say)

        def write(pending: tuple[int, Any]) -> None:
            number, metrics = pending
            health.settle(number)
            row = means(jax.device_get(metrics))
            row["examples_seen"] = seen + (number - start) * config.batch_size
            log.write(number, {**row, **clock.rate(number)})

        def settle() -> None:
            nonlocal pending
            if pending is not None:
                write(pending)
                pending = None
            health.settle(step)

        # ORDER OF EVENTS. Evaluation and saving come before the next batch is taken, so a checkpoint of step k says
        # all about step k: its rows are in the log, and the data stream goes on at its `examples_seen`. On resume at
        # k both have been done; but a run that is being stopped has seconds, and leaves the evaluation to the next
        # start. The metrics of an update are read one update later, while the device works on the next. Nothing is
        # saved before the health of every update in it was read.
        while True:
            last, stopping = step == config.steps, stop.is_due(step)
            evaluation_due = (step > start or unseen) and (last or (not stopping and step % config.evaluate.every == 0))
            if evaluation_due:
                settle()
                with TraceAnnotation("evaluate"):
                    values = _evaluate(training, state)
                    if last or not stop.noted:
                        log.write_evaluation(step, values, _previews(config, training, state))
            stopping = stopping or stop.noted  # meanwhile
            if stopping and not last:
                log.mark_preempting()
            save_due = step > start and (last or stopping or step % config.checkpoint.every == 0)
            if save_due:
                settle()
                with TraceAnnotation("save"):
                    wanted = getattr(program.objective, "measured", 0)
                    state = _measure(config, training, state, wanted, hurry=stopping and not last)
                    health.check_state(step, state.params, state.variables)
                    log.sync()
                    store.save(step, without_bases(config, state.as_trees()))
                    if state.averages:
                        snapshots.save(step, {AVERAGES: state.averages})
            if evaluation_due or save_due:
                clock.restart(step)  # a rate is of training alone
            if last or stopping:
                break
            trace.begin_if_due(step, state)
            with StepTraceAnnotation("train", step_num=step + 1):
                with TraceAnnotation("next_batch"):
                    batch = place_batch(next(reader), rows, config.batch_size, program.rows)
                with program.in_mesh():
                    state, metrics, verdict = program.train_step(state, training.frozen, batch)
            step += 1
            trace.end_if_due(step, state)
            health.add(step, metrics, verdict)
            if pending is not None:
                write(pending)
            pending = (step, metrics) if step % config.log.every == 0 or step == config.steps else None

        log.exit_code = EXIT_OK if step == config.steps else EXIT_PREEMPTED

    if counts := str(training.stream.tally):
        print(counts)
    if step < config.steps:
        saved = f"saved step {step}" if step else "nothing to save yet"
        if is_first():
            print(f"{stop.name}: {saved}; continue with: {shlex.join(_command())}", file=sys.stderr, flush=True)
        return EXIT_PREEMPTED
    if is_first():
        (workdir / DONE).write_text(f"{step}\n", encoding="utf-8")
        print(f"done: {spell_count(step, 'step')}, {workdir}")
    return EXIT_OK


def _reader(config: ConfigDict, training: _Training, seen: int) -> BatchReader:
    """The batches of the stream from example `seen`."""
    return BatchReader(
        training.stream,
        batch_size=config.batch_size,
        rows=training.rows,
        examples_seen=seen,
        workers=config.data.workers,
        read_ahead=config.data.read_ahead,
        processes=config.data.processes,
    )


def _has_evaluation(workdir: Location, step: int) -> bool:
    """Whether the log has the evaluation of the step that a run continues from."""
    return step > 0 and any(row["step"] == step and "examples_seen" not in row for row in read_metrics(workdir))


def _measure_first(
    config: ConfigDict, training: _Training, state: TrainState, say: Callable[[str], None]
) -> TrainState:
    """Lets an objective find out what it has to before the first update, if that is not known."""
    objective: Any = training.program.objective
    wanted = getattr(objective, "measured_first", 0)
    if not wanted or objective.has_measured(state.variables):
        return state
    say(f"measuring {spell_count(wanted, 'example')} before the first update")
    for started in starts_of(config):
        say(
            f"warning: {started.entry.source} does not bring along what is measured here; if its config says it, such "
            "as config.scales, set the same"
        )
    return _measure(config, training, state, wanted, hurry=False)


def _measure(config: ConfigDict, training: _Training, state: TrainState, wanted: int, hurry: bool) -> TrainState:
    """Lets an objective find out what it has to of the weights that are kept; each example is seen once.

    A run that is being stopped has seconds, and goes on later: in a hurry, what was found before stays, and where there
    is nothing of more than a batch, one batch is seen.
    """
    program, size = training.program, config.batch_size
    objective: Any = program.objective
    if not wanted or (hurry and objective.has_measured(state.variables)):
        return state
    wanted = min(wanted, size) if hurry else wanted
    with contextlib.closing(_reader(config, training, 0)) as reader:
        for number in range(min(-(-wanted // size), training.stream.pass_batches(size))):
            batch = place_batch(next(reader), training.rows, size, program.rows)
            with program.in_mesh():
                state = program.measure(state, training.frozen, batch, jnp.asarray(number, jnp.int32))
    return state


class _Clock:
    """The rate of training."""

    def __init__(self, batch_size: int, step: int):
        self._batch_size = batch_size
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begins to count at this step."""
        self._since, self._step = time.monotonic(), step

    def rate(self, step: int) -> dict[str, float]:
        """The fields of a row that may differ between reruns."""
        seconds, steps = time.monotonic() - self._since, step - self._step
        self.restart(step)
        return {"time/now": time.time(), "time/examples_per_second": steps * self._batch_size / max(seconds, 1e-9)}


def _evaluate(training: _Training, state: TrainState) -> dict[str, float]:
    """Mean metrics over the validation batches, named `validation/...`."""
    totals: dict[str, tuple[Any, Any]] = {}
    for batch in training.validation():
        with training.program.in_mesh():
            metrics = training.program.eval_step(state, training.frozen, batch)
        for name, pair in jax.device_get(metrics).items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + pair[0], before[1] + pair[1])
    return {f"validation/{name}": value for name, value in means(totals).items()}


def _previews(config: ConfigDict, training: _Training, state: TrainState) -> dict[str, Any]:
    """The objective's previews as pictures; every process computes them, and process 0 keeps them."""
    rng = jax.random.key(config.seed)
    previews = training.program.objective.preview(
        state.inference_params, state.variables, training.frozen, training.preview_batch, rng
    )
    if not is_first():
        return {}
    return {name: _draw(preview, training) for name, preview in previews.items()}


def _draw(preview: Preview, training: _Training) -> Any:
    labels = preview.labels
    if labels is not None and not isinstance(labels, tuple):
        tokenizer = training.writer if preview.written else training.tokenizer
        labels = tuple(tokenizer.decode(ids) for ids in labels) if tokenizer is not None else None
    return draw_grid(preview.images, columns=preview.columns, labels=labels)


def _command() -> list[str]:
    return ["python", *sys.orig_argv[1:]]
