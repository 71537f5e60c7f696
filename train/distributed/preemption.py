"""Ctrl-C and SIGTERM as a wish to stop at the next step, the same one on every process."""

import os
import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Inside the `with` block, the first SIGINT or SIGTERM asks for a stop; a second SIGINT interrupts at once.

    With several processes, a signal to any of them stops all of them before the same step. JAX's preemption service
    arranges that, and has taken SIGTERM for itself; so SIGTERM is left to it, and SIGINT is passed on as one.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._shared = jax.process_count() > 1

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT,) if self._shared else (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def is_due(self, step: int) -> bool:
        """Whether to stop before update `step` + 1; to be asked once before every update, by every process."""
        if self._shared and multihost_utils.reached_preemption_sync_point(step):
            self.name = self.name or "SIGTERM"
            return True
        return self.noted

    @property
    def noted(self) -> bool:
        """Whether a signal has come; never with several processes, which hear of it by `is_due`, at the same step."""
        return not self._shared and self.name is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
