"""Notices the first update whose loss or gradient is not finite, without making the device wait for the host."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cli.errors import UserError
from train.distributed.sharding import path_name
from train.metric_writer import means
from train.objectives.contract import Metrics
from train.step import Health

Tree = Any

MODES = ("stop", "skip")
# The health of an update is read after this many further ones were started: the device always has work, and every
# process notices at the same update.
LAG = 2
# Updates in a row that may be skipped before a run is given up.
PATIENCE = 100


class HealthCheck:
    """Reads the health of every update a little later, and ends the run or reports that one was left out."""

    def __init__(self, mode: str, params: Tree, say: Callable[[str], None]):
        """Prepares the check.

        Args:
          mode: "stop" or "skip", `config.nonfinite`.
          params: the trained parameters or their shapes, whose paths are named.
          say: prints a line.
        """
        self._mode, self._say = mode, say
        self._paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        self._waiting: collections.deque[tuple[int, Metrics, Health]] = collections.deque()
        self._in_a_row = 0

    def add(self, step: int, metrics: Metrics, health: Health) -> None:
        """Takes note of update `step`, and reads those that are due.

        Raises:
          UserError: see `settle`.
        """
        self._waiting.append((step, metrics, health))
        self.settle(step - LAG)

    def settle(self, step: int) -> None:
        """Reads the health of every update up to `step`.

        Raises:
          UserError: if one was not finite and the mode is "stop", or if too many in a row were skipped; names the
            update, its metrics and the first parameters whose gradient is not finite.
        """
        while self._waiting and self._waiting[0][0] <= step:
            number, metrics, health = self._waiting.popleft()
            norms = np.asarray(health.leaf_norms)
            with np.errstate(over="ignore"):
                total = np.sqrt(np.sum(np.square(norms)))
            if np.isfinite(health.loss) and np.isfinite(total):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            what = self._describe(number, metrics, norms)
            if self._mode == "stop":
                raise UserError(
                    f"{what}; lower the learning rate or the clip norm, or set config.nonfinite=skip; "
                    "the last checkpoint is intact"
                )
            if self._in_a_row >= PATIENCE:
                raise UserError(f"{PATIENCE} updates in a row were not finite and skipped; the last: {what}")
            self._say(f"warning: {what}; this update is left out")

    def check_state(self, step: int, params: Tree, variables: Tree) -> None:
        """Looks at what is about to be saved: a finite gradient, too, can make an update that overflows.

        Raises:
          UserError: names the first values that are not finite.
        """
        tree = {"params": params, "variables": variables}
        finite = np.asarray(_are_finite(jax.tree.leaves(tree)))
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        broken = [path for path, fine in zip(paths, finite, strict=True) if not fine]
        if broken:
            rest = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise UserError(
                f"step {step}: {', '.join(broken[:3])}{rest} is no longer finite, though every gradient was; lower the "
                "learning rate; nothing of it is saved, the last checkpoint is intact"
            )

    def _describe(self, step: int, metrics: Metrics, norms: np.ndarray) -> str:
        values = means(jax.device_get(metrics))
        shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items() if name != "learning_rate")
        broken = [path for path, norm in zip(self._paths, norms, strict=True) if not np.isfinite(norm)]
        rest = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        where = f"; the gradient is not finite at {', '.join(broken[:3])}{rest}" if broken else ""
        return f"step {step} is not finite: {shown}{where}"


@jax.jit
def _are_finite(leaves: list[Any]) -> Any:
    """Whether each array is finite, bool [n]."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
