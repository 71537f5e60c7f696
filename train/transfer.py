"""Fine-tuning: parts of a new state that start from trained weights, and checkpoints that leave these out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cli.errors import UserError
from train.distributed.processes import is_first
from train.distributed.sharding import path_name
from train.state import TrainState, start_average
from train.trainable import trained_params, trained_patterns
from weights import power_averages
from weights.sources import place_whole
from weights.starts import is_based, load_bases, other_stages, starts_of

Tree = Any


def initialize_parts(config: ConfigDict, state: TrainState, init_optimizer: Callable[[Tree], Tree]) -> TrainState:
    """Replaces `state.params[part]` by the weights that `config.initialize.<part>` names, if any; "random" is none.

    An entry with a path `at`, such as "vision_adapter/language", is of a network within a part; its name is free. A
    network may make some of the parameters in such a place of another kind's, by its method `adopt`. A warning says
    where the weights learned beside other frozen networks, see `weights.starts.other_stages`.

    Variables, such as what was measured of latents, come along where the run has such; a warning says so where not.

    The moving average and the optimizer start from those of the new parameters that are trained. A network may take
    parameters of one that differs in its fields `ADAPTABLE`, by its method `adapt`.

    Raises:
      UserError: if there is no such part, or its network computes something else (all differing fields listed), or
        its shapes differ.
    """
    starts = starts_of(config)
    if not starts:
        return state
    params, variables = dict(state.params), dict(state.variables)
    for start in starts:
        name, entry = start.name, start.entry
        at, *inner = start.at.split("/")
        if at not in params:
            raise UserError(f"config.initialize.{name}: this objective trains {', '.join(params)}")
        part = start.load(config)
        lines = other_stages(start, config)  # on every process: reading checkpoints is collective
        for line in lines if is_first() else ():
            print(f"warning: {line}", flush=True)
        if inner:
            whole = dict(params[at])
            params[at] = whole
            (place,) = inner
            kept: dict[Any, Any] = {}
            there = whole[place]
            if start.adopted(config):  # of the other parameters in that place nothing is said
                flat, given = flatten_dict(there), flatten_dict(part.params)
                kept = {path: leaf for path, leaf in flat.items() if path not in given}
                there = unflatten_dict({path: leaf for path, leaf in flat.items() if path in given})
            placed = _placed(name, entry, part.params, there)
            whole[place] = unflatten_dict({**kept, **flatten_dict(placed)})
            continue
        params[name] = _placed(name, entry, part.params, params[name])
        if name in variables and part.variables:
            variables[name] = jax.tree.map(place_whole, part.variables, variables[name])
        elif part.variables and is_first():
            measured = ", ".join(flatten_dict(part.variables, sep="/"))
            print(
                f"warning: config.initialize.{name}: {entry.source} brings along what it measured ({measured}), and "
                "this run's config says that itself, such as config.scales; set the same, or 0 to take what was "
                "measured",
                flush=True,
            )
    trained = trained_params(params, trained_patterns(config))
    averaged = trained if jax.tree.leaves(state.ema_params) else {}
    averages = power_averages.start(trained, config.ema.lengths, config.ema.paths)
    as_before = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    opt_state = jax.jit(init_optimizer, out_shardings=as_before)(params)
    averaged = start_average(averaged)
    changed = {"params": params, "variables": variables, "ema_params": averaged, "averages": averages}
    return dataclasses.replace(state, opt_state=opt_state, **changed)


def _placed(name: str, entry: ConfigDict, given: Tree, params: Tree) -> Tree:
    """Weights in the place of parameters. Raises UserError if their shapes differ."""
    have = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(given)}
    want = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wrong = sorted(
        path
        for path in want.keys() | have.keys()
        if path not in want or path not in have or want[path].shape != have[path].shape
    )
    if wrong:
        raise UserError(f"config.initialize.{name}: {entry.source} does not fit at {', '.join(wrong)}")
    return jax.tree.map(place_whole, given, params)


def without_bases(config: ConfigDict, trees: dict[str, Tree]) -> dict[str, Tree]:
    """The trees of a state without those parameters that a run of low-rank pairs leaves to their sources.

    Args:
      config: of the run.
      trees: `TrainState.as_trees`, or their shapes.
    """
    flat = flatten_dict(trees["params"], sep="/")
    trained = flatten_dict(trained_params(trees["params"], trained_patterns(config)), sep="/")
    kept = {path: leaf for path, leaf in flat.items() if path in trained or not is_based(config, path)}
    return {**trees, "params": unflatten_dict(kept, sep="/")}


def with_bases(config: ConfigDict, trees: dict[str, Tree], abstract: dict[str, Tree]) -> dict[str, Tree]:
    """The inverse of `without_bases`: reads what was left out from its sources.

    Args:
      config: of the run.
      trees: without it.
      abstract: all of them, by shape and sharding.

    Raises:
      UserError: if a source is missing, or not the one that the run began with.
    """
    flat, wanted = (flatten_dict(each["params"], sep="/") for each in (trees, abstract))
    for path, leaf in flatten_dict(load_bases(config), sep="/").items():
        if path not in flat:
            flat[path] = place_whole(leaf, wanted[path])
    return {**trees, "params": unflatten_dict(flat, sep="/")}
