"""Where metrics and pictures go: metrics.jsonl, the progress bar, PNG files, and Weights & Biases."""

import functools
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ml_collections import ConfigDict
from PIL import Image

from cli.compilation_cache import cache_home
from cli.config import flatten
from cli.errors import EXIT_FAILURE
from cli.locations import Location, absolute, explain, in_store, make_folder, write_whole
from data import pictures
from train.progress import ProgressBar
from weights.run import METRICS, SAMPLES, read_metrics

_LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_WRITES = 60.0  # of the whole file to a store


class MetricLog:
    """`metrics.jsonl`: one JSON object a line, each with its `step`.

    Only fields under `time/` may differ in a rerun.
    """

    def __init__(self, workdir: Location, resume_step: int):
        """Opens the log and drops what was written after the checkpoint that the run continues from.

        Args:
          workdir: the run folder.
          resume_step: step of that checkpoint; 0 for a new run.
        """
        path = workdir / METRICS
        rows = [row for row in read_metrics(workdir) if row["step"] <= resume_step] if resume_step else []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(path, text)
        self._file = _ObjectOfLines(path, text) if in_store(path) else _FileOfLines(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row; a killed run keeps it, but in a store perhaps not the rows since its last checkpoint.

        A value that is not finite becomes null: JSON has no NaN.
        """
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.append(json.dumps({"step": step, **row}, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Puts the rows on disk, also where that is far away: before a checkpoint that relies on them."""
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _FileOfLines:
    """A file to which each line is appended and handed to the operating system."""

    def __init__(self, path: Location):
        self._file = path.open("a", encoding="utf-8")

    def append(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _ObjectOfLines:
    """An object in a store, which has no append: written again as a whole, before a checkpoint and about once a minute.

    Rows that come after a checkpoint are dropped when a run continues from it, so no more than those are lost with a
    machine. Who writes a long file over a slow line waits longer: what is sent takes a fiftieth of the time at most.
    A store that does not answer between checkpoints does not end a run: the rows wait, and `sync` says so if it must.
    """

    def __init__(self, path: Location, text: str):
        self._path, self._lines, self._unsent = path, [text], False
        self._due = time.monotonic() + _SECONDS_BETWEEN_WRITES

    def append(self, line: str) -> None:
        self._lines.append(line)
        self._unsent = True
        if time.monotonic() >= self._due:
            try:
                self.sync()
            except Exception as error:
                self._due = time.monotonic() + _SECONDS_BETWEEN_WRITES
                _LOG.warning("%s waits: %s", self._path, " ".join(str(explain(error) or error).split()))

    def sync(self) -> None:
        if self._unsent:
            start = time.monotonic()
            write_whole(self._path, "".join(self._lines))
            self._unsent, now = False, time.monotonic()
            self._due = now + max(_SECONDS_BETWEEN_WRITES, 50 * (now - start))

    def close(self) -> None:
        self.sync()


class WandbLog:
    """Weights & Biases from a thread of its own: whatever happens to it, the run neither stops nor waits."""

    def __init__(self, config: ConfigDict, workdir: Location, run_id: str, run_config: Mapping[str, Any]):
        """Begins to connect in the background.

        Args:
          config: `config.wandb`: mode (`online`, `offline`, `disabled`), project, entity, name.
          workdir: the run folder; offline data goes to its `wandb/`, of a run in a store to the user's cache folder.
          run_id: constant over the life of the run, so that a resumed run is one run there too.
          run_config: shown as the run's config.
        """
        self._queue: queue.Queue[Callable[[Any], object] | None] = queue.Queue(maxsize=1000)
        self._thread, self._exit_code = None, 0
        if config.mode != "disabled":
            settings = {
                "mode": config.mode,
                "project": config.project,
                "entity": config.entity or None,
                "name": config.name or absolute(workdir).name,
                "dir": str(_wandb_folder(workdir, run_id)),
                "id": run_id,
                "resume": "allow",
                "config": dict(run_config),
            }
            self._thread = threading.Thread(target=self._work, args=(settings,), daemon=True, name="wandb")
            self._thread.start()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Queues a row; when the queue is full, the row is dropped rather than waited for."""
        self._put(functools.partial(_log_to_wandb, step, dict(values)))

    def mark_preempting(self) -> None:
        """Tells a sweep that this run was stopped from outside and is to be started again."""
        self._put(_mark_preempting)

    def _put(self, action: Callable[[Any], object]) -> None:
        if self._thread is not None:
            try:
                self._queue.put_nowait(action)
            except queue.Full:
                _LOG.debug("W&B is behind; a row is left out")

    def close(self, exit_code: int = 0, seconds: float = 15.0) -> None:
        """Lets the thread finish, but not for longer than `seconds`.

        Args:
          exit_code: how the run ended: W&B shows it, and a sweep starts a preempted run again only if it is not 0.
          seconds: how long to wait.
        """
        if self._thread is not None:
            self._exit_code = exit_code
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                return
            self._thread.join(seconds)
            if self._thread.is_alive():
                _LOG.warning("W&B did not finish in %.0f s and is left behind; metrics.jsonl is complete", seconds)
                # At exit W&B waits for its service process, for as long as the network takes to give up.
                for child in psutil.Process().children(recursive=True):
                    if "wandb" in child.name():
                        child.kill()

    def _work(self, settings: dict[str, Any]) -> None:
        ended = False
        try:
            import wandb  # takes a second to import, which is this thread's to spend

            run = wandb.init(settings=wandb.Settings(silent=True), **settings)
            while (action := self._queue.get()) is not None:
                action(run)
            ended = True
            run.finish(exit_code=self._exit_code)
        except Exception as error:
            # Any failure of a logging service is less important than the run.
            _LOG.warning("W&B stopped (%s); metrics.jsonl goes on", (str(error) or repr(error)).splitlines()[0])
            while not ended and self._queue.get() is not None:
                pass


def _wandb_folder(workdir: Location, run_id: str) -> Path:
    """Where W&B keeps its files, on this machine."""
    if not in_store(workdir):
        return workdir
    folder = cache_home() / "tessera" / "wandb" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _log_to_wandb(step: int, values: Mapping[str, Any], run: Any) -> None:
    import wandb

    run.log({k: wandb.Image(v) if isinstance(v, Image.Image) else v for k, v in values.items()}, step=step)


def _mark_preempting(run: Any) -> None:
    run.mark_preempting()


class RunLog:
    """All the places where a run reports, as one."""

    def __init__(self, config: ConfigDict, workdir: Location, start: int, run_id: str):
        """Opens them for a run that begins or goes on at step `start`."""
        self.exit_code = EXIT_FAILURE  # until the run says that it ended otherwise
        self._workdir = workdir
        self._bar = ProgressBar(config.steps, start, workdir.name)
        self._metrics = MetricLog(workdir, start)
        self._wandb = WandbLog(config.wandb, workdir, run_id, flatten(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Reports the metrics of an update."""
        self._metrics.write(step, values)
        self._wandb.write(step, values)
        if "loss" in values:
            self._bar.update(step, values)

    def write_evaluation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        """Reports an evaluation, and saves its pictures; these first, since the row says that all was done."""
        for name, picture in pictures.items():
            save_picture(self._workdir, step, name, picture)
        self._metrics.write(step, values)
        self._wandb.write(step, {**values, **{f"samples/{name}": picture for name, picture in pictures.items()}})

    def say(self, line: str) -> None:
        """Prints a line."""
        self._bar.say(line)

    def sync(self) -> None:
        """See `MetricLog.sync`."""
        self._metrics.sync()

    def mark_preempting(self) -> None:
        """See `WandbLog.mark_preempting`."""
        self._wandb.mark_preempting()

    def close(self) -> None:
        """Closes them all."""
        self._metrics.close()
        self._bar.close()
        self._wandb.close(self.exit_code)


class SilentLog(RunLog):
    """The log of a process that is not the first: it says nothing."""

    def __init__(self) -> None:
        """Opens nothing."""
        self.exit_code = EXIT_FAILURE

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def write_evaluation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        """Does nothing."""

    def say(self, line: str) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def mark_preempting(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def save_picture(workdir: Location, step: int, name: str, picture: Image.Image) -> Location:
    """Writes `samples/<step>_<name>.png`."""
    folder = workdir / SAMPLES
    make_folder(folder)
    path = folder / f"{step:08d}_{name}.png"
    pictures.save_picture(path, picture)
    return path


def means(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Turns (sum, count) pairs, already on the host, into means; one that counted nothing has none."""
    return {name: float(np.asarray(total) / count) for name, (total, count) in metrics.items() if np.asarray(count) > 0}
