"""Ordered path-regex rules -> one optax transformation; bounds and moving averages of parameters."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.ranges import check_range, check_ranges
from train.distributed.sharding import check_pattern, path_name
from weights.lora import path_matches

Tree = Any
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


# What the mathematics allows of the numbers of a rule, and of its schedule.
_NUMBERS = {
    **dict.fromkeys(("b1", "b2"), "[0, 1)"),
    **{"eps": "(0, inf)", "weight_decay": "[0, inf)", "clip_norm": "[0, inf)"},
}
_SCHEDULE_NUMBERS = dict.fromkeys(("peak", "end", "factor", "warmup_steps", "decay_steps"), "[0, inf)")

# The keys that each choice reads; of the others a run says that they have no effect (`train.unread`).
READ_BY_SCHEDULE = {
    "constant": ("peak", "warmup_steps"),
    "warmup_cosine": ("peak", "end", "warmup_steps", "decay_steps"),
    "warmup_steps_down": ("peak", "warmup_steps", "boundaries", "factor"),
}
READ_BY_TRANSFORM = {
    "adamw": ("b1", "b2", "eps", "mu_dtype"),
    "lion": ("b1", "b2", "mu_dtype"),
    "muon": ("b1", "mu_dtype"),
    "sgd": (),
}
_MU_DTYPES = ("", "float32", "bfloat16")


def create_schedule(config: Mapping[str, Any], steps: int, name: str = "config.optimizer.schedule") -> Schedule:
    """Builds a learning-rate schedule.

    Args:
      config: {name, peak, end, warmup_steps, decay_steps, boundaries, factor}. All rise linearly from 0 to `peak` over
        `warmup_steps`. `constant`: `peak` from there on. `warmup_cosine`: a half cosine to `end` at `decay_steps`,
        which counts from step 0; 0 means all of `steps`. `warmup_steps_down`: multiplied by `factor` at each of
        `boundaries`, also inside the warm-up, and twice at one that stands twice.
      steps: length of the run.
      name: of the config, for errors.

    Raises:
      UserError: an unknown schedule, an impossible number, or a warm-up longer than the schedule.
    """
    kind, peak, warmup = config["name"], config["peak"], config["warmup_steps"]
    if not isinstance(kind, str) or kind not in READ_BY_SCHEDULE:
        raise UserError(f"unknown schedule {kind!r}; choose {', '.join(READ_BY_SCHEDULE)}")
    check_ranges(name, config, _SCHEDULE_NUMBERS)
    if not isinstance(config["boundaries"], tuple | list):
        raise UserError(f"{name}.boundaries is {config['boundaries']!r}; it must be a tuple of steps")
    for boundary in config["boundaries"]:
        check_range(f"{name}.boundaries", boundary, "[1, 2147483648)")
        if not isinstance(boundary, int):
            raise UserError(f"{name}.boundaries has {boundary}, which is no step; it must be a tuple of whole numbers")
    if kind == "warmup_cosine":
        decay_steps = config["decay_steps"] or steps
        if warmup >= decay_steps:
            raise UserError(f"{name}.warmup_steps={warmup} must be below the {decay_steps} steps of the schedule")
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else peak, peak, warmup, decay_steps, end_value=config["end"]
        )
    if warmup > steps:
        raise UserError(f"{name}.warmup_steps={warmup} must not be above the {steps} steps of the run")
    flat = optax.constant_schedule(peak)
    rising = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), flat], [warmup]) if warmup else flat
    if kind == "constant" or not config["boundaries"]:
        return rising
    boundaries, factor = jnp.asarray(config["boundaries"]), config["factor"]

    def down(step: Any) -> Any:
        return rising(step) * jnp.prod(jnp.where(step >= boundaries, factor, 1.0))

    return down


def complete_rules(config: ConfigDict, steps: int) -> list[dict[str, Any]]:
    """The rules of `config.optimizer`, each with the defaults for what it leaves out; see `create_optimizer`.

    Raises:
      UserError: on an unknown key or choice, an impossible number, or a pattern that is none.
    """
    rules = [_complete(config, rule, f"config.optimizer.rules[{index}]") for index, rule in enumerate(config.rules)]
    for index, (given, rule) in enumerate(zip(config.rules, rules, strict=True)):
        own = f"config.optimizer.rules[{index}]"
        for key, interval in _NUMBERS.items():
            check_range(f"{own if key in given else 'config.optimizer'}.{key}", rule[key], interval)
        create_schedule(
            rule["schedule"], steps, f"{own}.schedule" if given.get("schedule") else "config.optimizer.schedule"
        )
        if not isinstance(rule["transform"], str) or rule["transform"] not in READ_BY_TRANSFORM:
            raise UserError(
                f"unknown optimizer transform {rule['transform']!r}; choose one of {', '.join(READ_BY_TRANSFORM)}"
            )
        if rule["mu_dtype"] not in _MU_DTYPES:
            raise UserError(
                f"unknown mu_dtype {rule['mu_dtype']!r} of {own}; choose float32, bfloat16 or '', the parameters'"
            )
        check_pattern(f"{own}.pattern", rule["pattern"])
        check_pattern("no_decay of config.optimizer", rule["no_decay"])
    for index, bound in enumerate(config.bounds):
        if not isinstance(bound, tuple | list) or len(bound) != 3 or not all(map(_is_number, bound[1:])):
            raise UserError(f"config.optimizer.bounds[{index}] is {bound!r}; it must be (pattern, low, high)")
        pattern, low, high = bound
        check_pattern(f"config.optimizer.bounds[{index}]", pattern)
        if not (low <= high and low < math.inf and high > -math.inf):
            raise UserError(f"config.optimizer.bounds of {pattern!r} are impossible: no number is from {low} to {high}")
    return rules


def create_optimizer(
    config: ConfigDict, params: Tree, steps: int, whole: Tree = None
) -> tuple[optax.GradientTransformation, Schedule]:
    """Builds the optimizer of a run.

    Each rule's parameters are clipped by their own global norm, so one part cannot silence another.

    Args:
      config: `config.optimizer`: defaults {transform, b1, b2, eps, mu_dtype, weight_decay, no_decay, clip_norm,
        schedule} and `rules`, an ordered tuple of {pattern, ...overrides}; a parameter belongs to the first rule whose
        pattern is found in its path; of a low-rank pair see `weights.lora.path_matches`, also for all other patterns
        here.
      params: the trained parameters or their shapes.
      steps: length of the run.
      whole: these and the parameters that are not trained, of which a rule may speak too; None if all are trained.

    Returns:
      The transformation, and the schedule of the first rule that has something to do, for the log.

    Raises:
      UserError: if a trained parameter matches no rule or a rule matches no parameter at all.
    """
    rules = complete_rules(config, steps)

    def label(path: tuple[Any, ...], _: Any) -> int:
        index = _first_match(path_name(path), rules)
        if index is None:
            raise UserError(
                f"no optimizer rule matches parameter {path_name(path)}; end config.optimizer.rules with pattern '.*'"
            )
        return index

    labels = jax.tree_util.tree_map_with_path(label, params)
    used = set(jax.tree.leaves(labels))
    others = jax.tree_util.tree_leaves_with_path(whole)
    known = used | {_first_match(path_name(path), rules) for path, _ in others}
    for index, rule in enumerate(rules):
        if index not in known:
            raise UserError(f"optimizer rule {index} matches no parameter: {rule['pattern']!r}")
    schedules = [create_schedule(rule["schedule"], steps) for rule in rules]
    transforms = [_transform(rule, schedule) for rule, schedule in zip(rules, schedules, strict=True)]
    return optax.partition({index: transforms[index] for index in sorted(used)}, labels), schedules[min(used)]


def apply_bounds(config: ConfigDict, params: Tree) -> Tree:
    """Projects parameters into their bounds after an update.

    Args:
      config: `config.optimizer`, whose `bounds` is a tuple of (pattern, low, high).
      params: the updated parameters.
    """

    def project(path: tuple[Any, ...], value: Array) -> Array:
        for pattern, low, high in config.bounds:
            if path_matches(pattern, path_name(path)):
                value = jnp.clip(value, low, high)
        return value

    return jax.tree_util.tree_map_with_path(project, params) if config.bounds else params


def update_ema(config: ConfigDict, ema_params: Tree, params: Tree, step: Int[Array, ""]) -> Tree:
    """Moves the average of parameters.

    Args:
      config: `config.ema`: `decay`; `warm_up`, whether the decay is min(decay, (1 + n) / (10 + n)) at the n-th update
        of the average; `every`, steps between updates; `paths`, a regex of the paths averaged (others are copied).
      ema_params: the average so far, in float32 or finer whatever the parameters have: in bfloat16 it would not move
        by the thousandth of a difference.
      params: parameters after update number `step`.
      step: updates done, this one included.

    Raises:
      UserError: if the average is kept in less.
    """
    coarse = {str(leaf.dtype) for leaf in jax.tree.leaves(ema_params) if leaf.dtype in (jnp.bfloat16, jnp.float16)}
    if coarse:
        raise UserError(f"a moving average in {coarse.pop()} stops moving; keep it in float32")
    count = (step // config.every).astype(jnp.float32)
    decay = jnp.minimum(config.decay, (1 + count) / (10 + count)) if config.warm_up else jnp.float32(config.decay)
    decay = jnp.where(step % config.every == 0, decay, 1.0)

    def move(path: tuple[Any, ...], average: Array, value: Array) -> Array:
        if not path_matches(config.paths, path_name(path)):
            return value.astype(average.dtype)
        return (decay * average + (1 - decay) * value).astype(average.dtype)

    return jax.tree_util.tree_map_with_path(move, ema_params, params)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _complete(config: ConfigDict, rule: Any, name: str) -> dict[str, Any]:
    """A rule with the defaults for what it leaves out; `name` is the rule's, for errors."""
    if not isinstance(rule, Mapping | ConfigDict):
        raise UserError(f"{name} is {rule!r}; it must be a dict such as {{'pattern': '.*'}}")
    defaults = {key: value for key, value in config.items() if key not in ("rules", "bounds")}
    if set(rule) - set(defaults) - {"pattern"} or "pattern" not in rule:
        raise UserError(f"optimizer rule {dict(rule)} needs a pattern and may set {', '.join(defaults)}")
    own = rule.get("schedule", {})
    if not isinstance(own, Mapping | ConfigDict):
        raise UserError(f"{name}.schedule is {own!r}; it must be a dict such as {{'peak': 1e-4}}")
    if unknown := sorted(map(str, set(own) - set(config.schedule))):
        raise UserError(f"{name}.schedule has no {', '.join(unknown)}; it may set {', '.join(config.schedule)}")
    schedule = {**dict(config.schedule), **dict(own)}
    return {**defaults, **dict(rule), "schedule": schedule}


def _first_match(name: str, rules: list[dict[str, Any]]) -> int | None:
    return next((index for index, rule in enumerate(rules) if path_matches(rule["pattern"], name)), None)


def _transform(rule: dict[str, Any], schedule: Schedule) -> optax.GradientTransformation:
    # Of the first moment alone: in bfloat16 a second one stands still, its updates being a thousandth of it.
    mu_dtype = rule["mu_dtype"] or None
    scale = {
        "adamw": lambda: optax.scale_by_adam(rule["b1"], rule["b2"], rule["eps"], mu_dtype=mu_dtype),
        "lion": lambda: optax.scale_by_lion(rule["b1"], rule["b2"], mu_dtype),
        "muon": lambda: _muon(rule["b1"], mu_dtype),
        "sgd": optax.identity,
    }

    def decayed(params: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path_matches(rule["no_decay"], path_name(path)), params
        )

    return optax.chain(
        optax.clip_by_global_norm(rule["clip_norm"]) if rule["clip_norm"] else optax.identity(),
        scale[rule["transform"]](),
        optax.add_decayed_weights(rule["weight_decay"], mask=decayed) if rule["weight_decay"] else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


# Of the quintic iteration that makes a matrix about orthogonal, and how often it is done (Jordan et al. 2024).
_NEWTON_SCHULZ, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def _muon(momentum: float, mu_dtype: str | None) -> optax.GradientTransformation:
    """Momentum made orthogonal (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").

    Its root mean square is 0.2, about that of Adam's updates, whose learning rates therefore suit it (Liu et al. 2025,
    "Muon is Scalable for LLM Training", eq. 4).
    """

    def orthogonal(path: tuple[Any, ...], update: Array) -> Array:
        rows, columns = _matrix_axes(path_name(path), update.ndim)
        matrices = tuple(axis for axis in range(update.ndim) if axis not in rows + columns)
        order = matrices + rows + columns
        turned = update.transpose(order)
        height, width = (math.prod(update.shape[axis] for axis in side) for side in (rows, columns))
        steps = [_orthogonalize(matrix) for matrix in turned.reshape(-1, height, width)]
        scaled = 0.2 * max(height, width) ** 0.5 * jnp.stack(steps)
        return scaled.reshape(turned.shape).transpose(sorted(range(update.ndim), key=order.__getitem__))

    return optax.chain(
        optax.trace(momentum, nesterov=True, accumulator_dtype=mu_dtype),
        optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(orthogonal, updates)),
    )


def _orthogonalize(x: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Brings singular values to about 1, by the iteration x <- (a + b x x^T + c (x x^T)^2) x.

    The factors are polynomials of the first x x^T, so that where x is long its iteration is one of squares: they are
    multiplied up, and x is multiplied once.
    """
    if x.shape[0] > x.shape[1]:
        return _orthogonalize(x.T).T
    x = x / (jnp.linalg.norm(x) + 1e-8)
    a, b, c = _NEWTON_SCHULZ
    gram = x @ x.T
    if x.shape[1] < 1.5 * x.shape[0]:
        for iteration in range(_ITERATIONS):
            gram = x @ x.T if iteration else gram
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x
    identity = jnp.eye(len(x), dtype=x.dtype)
    product = identity
    for iteration in range(_ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product if iteration else factor
        if iteration < _ITERATIONS - 1:
            gram = factor @ gram @ factor
    return product @ x


def _matrix_axes(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which axes of a kernel are its matrix's rows (inputs) and columns (outputs); others count matrices.

    Raises:
      UserError: if it is not a kernel.
    """
    if not name.endswith("kernel"):
        raise UserError(f"transform 'muon' is of kernels, and parameter {name} is none; give it another rule")
    if re.search(r"(query_|/)key_value/kernel$", name):  # [inputs, query and key and value, heads, width of a head]
        return (0,), (2, 3)
    if re.search(r"/(query|key|value)/kernel$", name):  # [inputs, heads, width of a head]
        return (0,), (1, 2)
    if name.endswith(("up_gate/kernel", "modulation/kernel")):  # [inputs, up and gate, hidden]; likewise shifts, scales
        return (0,), (2,)
    return tuple(range(ndim - 1)), (ndim - 1,)
