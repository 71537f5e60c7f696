"""Samplers as plans: from noise to data with a network that estimates the data, as one compiled scan.

A plan is computed in float64 before anything runs. At step i the network is asked once, for m_i = denoise(x_i, t_i),
and the next state is a linear combination

    x_{i+1} = a_i y_i + sum_j b_ij m_{i-j} + c_i z_i,

where y_i is the state that the step starts from (x_i, or an earlier one within a step of several stages) and z_i is
noise. `diffusion.solvers` makes the plans of the samplers; `solve` runs any of them, `advance` some steps of one.

Solvers of the noise estimates e_i = (x_i - alpha_i m_i) / sigma_i add multiples of their changes d_i = e_i - e_{i-1},
each of which is a combination of m_{i-1} - m_i and earlier changes. States and noise estimates themselves would be
multiplied by up to 1 / alpha_i, which may be 1e4, and cancel only in part in float32.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

State = Any  # an array or a pytree of arrays
Denoise = Callable[[State, Array], Any]  # (x_t, t []) -> estimate of x_0; with learned variances, (x_0, fraction)
Past = tuple[State, ...]
Progress = tuple[State, State, Past, Past]  # x_i, y_i, m_{i-1} and so on, d_{i-1} and so on
Noise = Callable[[Array], State]  # step -> standard normal, of the state's shapes


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The coefficients of a sampler; all arrays are float64.

    Attributes:
      t: [S], when the network is asked.
      alpha: [S], of the states it is asked about.
      sigma: [S], of them.
      state: [S], a_i.
      model: [S, J], b_ij: of this estimate, the one before, and so on.
      noise: [S], c_i.
      starts: [S], whether x_i is what later steps start from; else they start from y_{i-1}.
      change: None, or [S, K + 1]: d_i is its products with m_{i-1} - m_i, d_{i-1}, d_{i-2}, ...
      of_change: None, or [S, K]: factors of d_i, d_{i-1}, ... in x_{i+1}.
      corrector: None, or [S, J + 3]: before x_i is used it becomes its products with x_i, y_{i-1}, m_i, m_{i-1}, ...
      log_variance: None, or [S, 2]: c_i is learned, between the square roots of these two variances.
      first_noise: added to what the sampler starts from.
      start_sigma: of the noise in what it starts from; None for that in the first state that the network is asked
        about.
      start_scale: what fresh noise is multiplied by at the start; None for `first_scale`'s own.
    """

    t: Float[np.ndarray, " s"]
    alpha: Float[np.ndarray, " s"]
    sigma: Float[np.ndarray, " s"]
    state: Float[np.ndarray, " s"]
    model: Float[np.ndarray, "s j"]
    noise: Float[np.ndarray, " s"]
    starts: np.ndarray
    change: np.ndarray | None = None
    of_change: np.ndarray | None = None
    corrector: np.ndarray | None = None
    log_variance: np.ndarray | None = None
    first_noise: float = 0.0
    start_sigma: float | None = None
    start_scale: float | None = None

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if value is not None and not np.all(np.isfinite(np.asarray(value, np.float32))):
                    raise ValueError(
                        f"the sampler's {field.name} is not finite in float32; check the numbers of the schedule, or "
                        "choose other times"
                    )

    @property
    def state_scales(self) -> Float[np.ndarray, " s"]:
        """By how much each state is divided to be seen: its standard deviation, where that exceeds 1."""
        return np.maximum(np.hypot(self.alpha, self.sigma), 1).astype(np.float32)

    @property
    def evaluations(self) -> int:
        """How often the network is asked."""
        return len(self.t)

    @property
    def first_sigma(self) -> float:
        """The standard deviation of the noise in what sampling starts from."""
        return float(self.sigma[0] if self.start_sigma is None else self.start_sigma)

    @property
    def first_scale(self) -> float:
        """The standard deviation of the noise that sampling starts from, as published samplers have it.

        That of noisy data of variance 1, or sigma alone where noise grows on unscaled data, or what the plan says.
        """
        if self.start_scale is not None:
            return self.start_scale
        return self.first_sigma if self.alpha[0] == 1 else float(np.hypot(self.alpha[0], self.first_sigma))

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise."""
        return bool(np.any(self.noise)) or self.log_variance is not None or self.first_noise != 0


@dataclasses.dataclass(frozen=True)
class Solution:
    """Where a sampler ended.

    Attributes:
      x: the sample.
      states: the states at which the network was asked, [S, ...]; None unless asked for.
      estimates: the network's estimates of the data, [S, ...]; None unless asked for.
    """

    x: State
    states: State | None = None
    estimates: State | None = None


def solve(plan: Plan, denoise: Denoise, x: State, noise: Noise | None = None, *, trajectory: bool = False) -> Solution:
    """Runs a sampler: a scan over its plan, with one call of `denoise` a step.

    Args:
      plan: of the sampler.
      denoise: the network's estimate of the data, see `diffusion.process.Process.denoiser`.
      x: a sample at the plan's first time: float32, an array or a pytree.
      noise: standard normal noise of a step, where the plan draws any; step -1 is before the first.
      trajectory: also return what went on between.

    Raises:
      ValueError: if the plan draws noise and none is given.
    """

    def body(progress: Progress, row: dict[str, Array]) -> tuple[Progress, Any]:
        progress, shown = _step(plan, denoise, noise, progress, row)
        return progress, shown if trajectory else None

    (x, *_), shown = jax.lax.scan(body, begin(plan, x, noise), _rows(plan))
    return Solution(x, *shown) if trajectory else Solution(x)


def begin(plan: Plan, x: State, noise: Noise | None = None) -> Progress:
    """Where a sampler is before its first step, for `advance`. Arguments and errors are those of `solve`."""
    if plan.stochastic and noise is None:
        raise ValueError("this sampler draws noise; give it noise=")
    if plan.first_noise and noise is not None:
        x = _combine([(1.0, x), (plan.first_noise, noise(jnp.asarray(-1)))])
    zeros = jax.tree.map(jnp.zeros_like, x)
    depth = plan.model.shape[1]
    kept = depth if plan.corrector is not None else depth - 1
    known = 0 if plan.of_change is None else plan.of_change.shape[1]
    return x, x, (zeros,) * kept, (zeros,) * known


def advance(
    plan: Plan, denoise: Denoise, progress: Progress, first: Any, stop: Any, noise: Noise | None = None
) -> Progress:
    """Some steps of what `solve` runs, for whoever looks in between.

    Args:
      plan: see there.
      denoise: see there.
      progress: of `begin`, or of the steps before.
      first: the first of them; int32 [], which may be traced: one program then does any of them.
      stop: the one behind the last, likewise.
      noise: see there.

    Returns:
      Where the sampler is then; its first part is the state.
    """
    rows = _rows(plan)

    def body(step: Array, progress: Progress) -> Progress:
        row = {name: jax.lax.dynamic_index_in_dim(value, step, keepdims=False) for name, value in rows.items()}
        return _step(plan, denoise, noise, progress, row)[0]

    return jax.lax.fori_loop(first, stop, body, progress)


def _rows(plan: Plan) -> dict[str, Array]:
    """What the plan says of each step."""
    columns: dict[str, Any] = {
        "step": np.arange(plan.evaluations, dtype=np.int32),
        **{name: getattr(plan, name) for name in ("t", "alpha", "sigma", "state", "model", "noise")},
        "starts": plan.starts,
    }
    optional = {name: getattr(plan, name) for name in ("corrector", "log_variance", "change", "of_change")}
    columns |= {name: value for name, value in optional.items() if value is not None}
    return {
        name: jnp.asarray(value, jnp.float32 if value.dtype == np.float64 else value.dtype)
        for name, value in columns.items()
    }


def _step(
    plan: Plan, denoise: Denoise, noise: Noise | None, progress: Progress, row: dict[str, Array]
) -> tuple[Progress, tuple[State, State]]:
    """One step: where the sampler is behind it; and the state and estimate that it saw."""
    x, y, past, changes = progress
    before = len(past)
    m, fraction = denoise(x, row["t"]), None
    if plan.log_variance is not None:
        m, fraction = m
    shown = (x, m)
    if plan.change is not None:
        less = jax.tree.map(jnp.subtract, past[0], m)
        changes = (_combine(list(zip(row["change"], (less, *changes), strict=True))), *changes[:-1])
    if plan.corrector is not None:
        x = _combine(list(zip(row["corrector"], (x, y, m, *past), strict=True)))
    past = (m, *past)
    y = jax.tree.map(lambda new, old: jnp.where(row["starts"], new, old), x, y)
    terms = [(row["state"], y), *((row["model"][j], past[j]) for j in range(plan.model.shape[1]))]
    if plan.of_change is not None:
        terms += list(zip(row["of_change"], changes, strict=True))
    if plan.stochastic and noise is not None:
        drawn = noise(row["step"])
        if fraction is not None:
            low, high = row["log_variance"]
            scale = jax.tree.map(lambda part: jnp.exp((part * high + (1 - part) * low) / 2), fraction)
            drawn = jax.tree.map(jnp.multiply, scale, drawn)
        terms.append((row["noise"], drawn))
    return (_combine(terms), y, past[:before], changes), shown


def per_example_noise(keys: Array, x: State) -> Noise:
    """Noise of an example and step that depends on the example's key alone.

    Args:
      keys: one for each row.
      x: a state, whose arrays' first dimension is the rows'.
    """

    def noise(step: Array) -> State:
        leaves, structure = jax.tree.flatten(x)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step + 1)
        drawn = [
            jax.vmap(lambda key, leaf=leaf, place=place: jax.random.normal(jax.random.fold_in(key, place), leaf.shape))(
                step_keys, leaf
            )
            for place, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, drawn)

    return noise


def _combine(terms: Sequence[tuple[Any, State]]) -> State:
    """The sum of factors times states."""
    factors = [factor for factor, _ in terms]
    return jax.tree.map(
        lambda *leaves: sum(f * leaf for f, leaf in zip(factors, leaves, strict=True)), *(s for _, s in terms)
    )
