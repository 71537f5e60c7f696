"""Moving averages of any length, made after training from averages that it kept (Karras et al. 2024, EDM2, section 3).

A power-function average weighs the parameters of update s, seen from update t, by how much (s / t)^(gamma + 1) grows
there. Its length is the deviation of that profile over t, between 0 and 0.28; a longer one has a smaller gamma. Every
checkpoint stores the averages of the one or two lengths that training keeps; any other length is the sum of these
snapshots whose profile is nearest to its own, in the sense of least squares.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cli.errors import UserError
from weights.checkpoint import CheckpointStore

Tree = Any

AVERAGES = "averages"  # of a run: the folder of snapshots, and the name of their tree
LONGEST = 0.28  # of a gamma above 0

_BINS = 10_000  # of a profile: updates are counted together where there are more


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One average that training stored.

    Attributes:
      step: t, updates until then.
      length: of its profile, over t.
    """

    step: int
    length: float


def exponent(length: float) -> float:
    """Gamma + 1 of a length (the paper's algorithm 2): length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
      UserError: if there is no such length.
    """
    if not 0 < length <= LONGEST:
        raise UserError(
            f"a moving average of length {length} is impossible; lengths are deviations of its profile over the "
            f"training so far, above 0 and up to {LONGEST}, such as 0.1"
        )
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots[np.isreal(roots)].real.max()) + 1


def average_key(length: float) -> str:
    """What an average of a length is called among the trees of a state."""
    return f"length_{length:g}"


def start(params: Tree, lengths: Sequence[float]) -> Tree:
    """The averages before the first update, {`average_key`: {part: tree}}, in float32 or finer; copies.

    What they start at does not count in any: the first update takes its place.
    """

    def copy(leaf: Any) -> Any:
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))

    return {average_key(length): jax.tree.map(copy, params) for length in lengths}


def update(averages: Tree, params: Tree, step: Any) -> Tree:
    """The averages after an update (the paper's eq. 2): each goes the share 1 - (1 - 1 / t)^(gamma + 1) of its way.

    Args:
      averages: from `start`, or of the update before.
      params: {part: tree} after the update.
      step: t, updates done, this one included: int32 [].
    """
    left = jnp.log1p(-1 / step.astype(jnp.float32))  # keeps what 1 / t is beside 1 when t is large

    def move(length: float, tree: Tree) -> Tree:
        share = -jnp.expm1(exponent(length) * left)
        return jax.tree.map(lambda a, b: a + share.astype(a.dtype) * (b.astype(a.dtype) - a), tree, params)

    return {key: move(_length(key), tree) for key, tree in averages.items()}


def profile(snapshot: Snapshot, edges: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m-1"]:
    """How much the parameters of the updates between each two edges count in an average."""
    reached = np.minimum(edges / snapshot.step, 1.0) ** exponent(snapshot.length)
    return np.diff(reached)


def combination(snapshots: Sequence[Snapshot], target: Snapshot) -> Float[np.ndarray, " n"]:
    """Factors of snapshots, which add up to 1, whose sum is nearest to the average that `target` says.

    Raises:
      UserError: if there are no snapshots at or before it.
    """
    usable = [i for i, each in enumerate(snapshots) if each.step <= target.step]
    if not usable:
        raise UserError(f"no average was stored at or before step {target.step}")
    edges = np.unique(np.round(np.linspace(0, target.step, min(_BINS, target.step) + 1)))
    known = np.stack([profile(snapshots[i], edges) for i in usable])
    wanted = profile(target, edges)
    nearest = int(np.argmin(np.square(known - wanted).sum(axis=1)))
    rest = np.delete(np.arange(len(usable)), nearest)
    factors = np.zeros(len(snapshots))
    if len(rest):
        solution = np.linalg.lstsq((known[rest] - known[nearest]).T, wanted - known[nearest], rcond=1e-10)[0]
        factors[np.array(usable)[rest]] = solution
    factors[usable[nearest]] = 1 - factors.sum()
    return factors


def synthesize(run: Path, length: float, step: int, of: Sequence[float] | None = None) -> Tree:
    """The average of a length, from the snapshots in a run folder.

    Args:
      run: the folder.
      length: of the average, over `step`.
      step: from which it is seen.
      of: lengths of the snapshots to make it of; None for all.

    Returns:
      {part: tree} of what is trained, float32.

    Raises:
      UserError: if the run stored none, or the length is impossible.
    """
    exponent(length)
    store = CheckpointStore(run / AVERAGES)
    steps = store.steps()
    if not steps:
        raise UserError(
            f"{run} has no averages to make others of: it was trained with config.ema.lengths=(), which keeps none; "
            "leave --ema out"
        )
    stored = {number: store.abstract(number)[AVERAGES] for number in steps if number <= step}
    kept = [Snapshot(number, _length(key)) for number, tree in stored.items() for key in tree]
    snapshots = [each for each in kept if of is None or each.length in of]
    factors = combination(snapshots, Snapshot(step, length))
    total: Tree = None
    for number in stored:
        trees = store.load(number, (AVERAGES,))[AVERAGES]
        for snapshot, factor in zip(snapshots, factors, strict=True):
            if snapshot.step == number and factor:
                total = _add(total, trees[average_key(snapshot.length)], float(factor))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), total)


def _length(key: str) -> float:
    """The inverse of `average_key`."""
    return float(key.removeprefix("length_"))


def _add(total: Tree, tree: Tree, factor: float) -> Tree:
    """A sum of trees in float64, as factors may be large and cancel."""
    scaled = jax.tree.map(lambda leaf: factor * np.asarray(leaf, np.float64), tree)
    return scaled if total is None else jax.tree.map(np.add, total, scaled)
