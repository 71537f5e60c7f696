"""Moving averages of any length, made after training from averages that it kept (Karras et al. 2024, EDM2, section 3).

A power-function average weighs the parameters of update s, seen from update t, by how much (s / t)^(gamma + 1) grows
there. Its length is the deviation of that profile over t, between 0 and 0.28; a longer one has a smaller gamma. Every
checkpoint stores the averages of the one or two lengths that training keeps; another length is the sum of these
snapshots whose profile is nearest to its own, in the sense of least squares. How near that is depends on the snapshots:
with few of them, or one length, some lengths are out of reach, and refused.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from cli.errors import UserError
from cli.locations import Location
from weights.checkpoint import CheckpointStore
from weights.lora import path_matches

Tree = Any

AVERAGES = "averages"  # of a run: the folder of snapshots, and the name of their tree
LONGEST = 0.28  # of a gamma above 0

FARTHEST = 0.05  # from the profile that was asked for, as a share of its norm

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


def exponent(length: Any) -> float:
    """Gamma + 1 of a length (the paper's algorithm 2): length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
      UserError: if there is no such length.
    """
    if not isinstance(length, int | float) or not 0 < length <= LONGEST:
        raise UserError(
            f"a moving average of length {length!r} is impossible; lengths are deviations of its profile over the "
            f"training so far, above 0 and up to {LONGEST}, such as 0.1"
        )
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots[np.isreal(roots)].real.max()) + 1


def average_key(length: float) -> str:
    """What an average of a length is called among the trees of a state."""
    return f"length_{length:g}"


def start(params: Tree, lengths: Sequence[float], paths: str = ".*") -> Tree:
    """The averages before the first update, {`average_key`: {part: tree}}, in float32 or finer; copies.

    What they start at does not count in any: the first update takes its place.

    Args:
      params: {part: tree}.
      lengths: of the averages.
      paths: a regex of the paths that are averaged; averages lack the others.
    """
    flat = flatten_dict(params, sep="/")
    averaged = unflatten_dict({path: leaf for path, leaf in flat.items() if path_matches(paths, path)}, sep="/")
    if not averaged:
        return {}

    def copy(leaf: Any) -> Any:
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))

    return {average_key(length): jax.tree.map(copy, averaged) for length in lengths}


def update(averages: Tree, params: Tree, step: Any) -> Tree:
    """The averages after an update (the paper's eq. 2): each goes the share 1 - (1 - 1 / t)^(gamma + 1) of its way.

    Args:
      averages: from `start`, or of the update before.
      params: {part: tree} after the update; those that averages lack are left out.
      step: t, updates done, this one included: int32 [].
    """
    left = jnp.log1p(-1 / step.astype(jnp.float32))  # keeps what 1 / t is beside 1 when t is large

    def move(length: float, tree: Tree) -> Tree:
        share = -jnp.expm1(exponent(length) * left)
        new: dict[Any, Any] = flatten_dict(params)
        old: dict[Any, Any] = flatten_dict(tree)
        moved = {path: a + share.astype(a.dtype) * (new[path].astype(a.dtype) - a) for path, a in old.items()}
        return unflatten_dict(moved)

    return {key: move(_length(key), tree) for key, tree in averages.items()}


def profile(snapshot: Snapshot, edges: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m-1"]:
    """How much the parameters of the updates between each two edges count in an average."""
    reached = np.minimum(edges / snapshot.step, 1.0) ** exponent(snapshot.length)
    return np.diff(reached)


def combination(snapshots: Sequence[Snapshot], target: Snapshot) -> tuple[Float[np.ndarray, " n"], float]:
    """Factors of snapshots, which add up to 1, whose sum is nearest to the average that `target` says.

    Returns:
      (factors, how far the sum's profile is from the target's, as a share of the norm of that).

    Raises:
      UserError: if there are no snapshots at or before it, or it is farther than `FARTHEST` from all of their sums.
    """
    factors, error = _nearest(snapshots, target)
    if error > FARTHEST:
        lengths = [round(0.01 * n, 2) for n in range(1, round(100 * LONGEST) + 1)]
        reached = [each for each in lengths if _nearest(snapshots, Snapshot(target.step, each))[1] <= FARTHEST]
        raise UserError(
            f"the averages that were stored come no nearer than {error:.0%} to one of length {target.length:g} at step "
            f"{target.step}; {_spell(reached)} within {FARTHEST:.0%}, and more checkpoints or lengths "
            "(config.checkpoint.every, config.ema.lengths) would bring more"
        )
    return factors, error


def _spell(lengths: Sequence[float]) -> str:
    """Which lengths are reached, in whole hundredths, for messages."""
    if not lengths:
        return "no length in whole hundredths is"
    runs = [[lengths[0], lengths[0]]]
    for each in lengths[1:]:
        if each - runs[-1][1] > 0.015:
            runs.append([each, each])
        runs[-1][1] = each
    spelled = ", ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in runs)
    return f"lengths {spelled} are"


def _nearest(snapshots: Sequence[Snapshot], target: Snapshot) -> tuple[Float[np.ndarray, " n"], float]:
    """See `combination`; however far it is."""
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
    missed = factors[usable] @ known - wanted
    return factors, float(np.linalg.norm(missed) / np.linalg.norm(wanted))


def synthesize(run: Location, length: float, step: int, of: Sequence[float] | None = None) -> tuple[Tree, float]:
    """The average of a length, from the snapshots in a run folder.

    Args:
      run: the folder.
      length: of the average, over `step`.
      step: from which it is seen.
      of: lengths of the snapshots to make it of; None for all.

    Returns:
      ({part: tree} of what is averaged, float32; how far its profile is from the one asked for, see `combination`).

    Raises:
      UserError: if the run stored none, or the length is impossible or out of their reach.
    """
    stored, snapshots, factors, error = _parts(run, length, step, of)
    store = CheckpointStore(run / AVERAGES)
    total: Tree = None
    for number in stored:
        trees = store.load(number, (AVERAGES,))[AVERAGES]
        for snapshot, factor in zip(snapshots, factors, strict=True):
            if snapshot.step == number and factor:
                total = _add(total, trees[average_key(snapshot.length)], float(factor))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), total), error


def check_length(run: Location, length: float, step: int) -> None:
    """Raises UserError if `synthesize` would; reads no weights."""
    _parts(run, length, step, None)


def _parts(
    run: Location, length: float, step: int, of: Sequence[float] | None
) -> tuple[list[int], list[Snapshot], Float[np.ndarray, " n"], float]:
    """Of what `synthesize` makes an average: steps, the snapshots stored at them, their factors, how far it is."""
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
    factors, error = combination(snapshots, Snapshot(step, length))
    return list(stored), snapshots, factors, error


def _length(key: str) -> float:
    """The inverse of `average_key`."""
    return float(key.removeprefix("length_"))


def _add(total: Tree, tree: Tree, factor: float) -> Tree:
    """A sum of trees in float64, as factors may be large and cancel."""
    scaled = jax.tree.map(lambda leaf: factor * np.asarray(leaf, np.float64), tree)
    return scaled if total is None else jax.tree.map(np.add, total, scaled)
