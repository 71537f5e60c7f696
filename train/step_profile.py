"""`--profile=N`: what N updates spend their time on, as a trace of `jax.profiler`."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cli.locations import Location, in_store, upload

# The first update of a process compiles; on a GPU it also tunes kernels.
WARM_UP = 1


class StepProfile:
    """Traces some updates of a run; the loop tells it about each of them.

    The trace begins and ends between updates, when the device has nothing left to do, so that it holds whole updates
    and no others. Python's own calls are left out of it, since recording each would make the host seem slow.
    """

    def __init__(self, folder: Location, updates: int, start: int, steps: int, say: Callable[[str], None]):
        """Plans the trace of a run that begins or goes on at step `start`.

        Args:
          folder: gets `plugins/profile/<time>/<host>.xplane.pb`; in a store once the trace has ended.
          updates: how many to trace; 0 for none.
          start: updates that are done.
          steps: updates of the whole run. A run that goes on may have fewer left than are asked for.
          say: prints a line.
        """
        self._folder, self._say, self._running = folder, say, False
        self._traced: Path | None = None  # where the profiler writes
        self._first = start + WARM_UP
        self._last = min(self._first + updates, steps)
        if updates and self._last - self._first < updates:
            left = max(0, self._last - self._first)
            say(f"warning: --profile={updates}: after its first the run has {left} updates left to trace")

    def begin_if_due(self, step: int, state: Any) -> None:
        """To be called before an update, with the number of updates that are done and the state after them."""
        if step == self._first and step < self._last:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            self._traced = Path(tempfile.mkdtemp()) if in_store(self._folder) else self._folder
            jax.profiler.start_trace(self._traced, profiler_options=options)
            self._running = True

    def end_if_due(self, step: int, state: Any) -> None:
        """To be called after an update, with the number of updates that are done and the state after them."""
        if self._running and step == self._last:
            jax.block_until_ready(state)
            self._end(f"traced updates {self._first + 1} to {step}")

    def close(self) -> None:
        """Writes what was traced if the run ends in the middle."""
        if self._running:
            self._end("the run ended before all updates were traced")

    def _end(self, what: str) -> None:
        self._running = False
        jax.profiler.stop_trace()
        if self._traced is not None and self._traced != self._folder:
            upload(self._traced, self._folder)
            shutil.rmtree(self._traced)
        self._say(f"profile: {what}; see {self._folder} with XProf or Perfetto (docs/performance.md)")
