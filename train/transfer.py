"""Fine-tuning: parts of a new state that start from trained weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from cli.errors import UserError
from models import create_model
from train.distributed.sharding import path_name
from train.state import TrainState, start_average
from train.trainable import trained_params
from weights import power_averages
from weights.run import Run, model_of
from weights.sources import (
    RANDOM,
    differing_fields,
    find_source,
    load_part,
    place_whole,
    trained_model,
)

Tree = Any


def initialize_parts(config: ConfigDict, state: TrainState, init_optimizer: Callable[[Tree], Tree]) -> TrainState:
    """Replaces `state.params[part]` by the weights that `config.initialize.<part>` names, if any; "random" is none.

    An entry with a path `at`, such as "vision_adapter/language", is of a network within a part; its name is free.

    The moving average and the optimizer start from those of the new parameters that are trained. A network may take
    parameters of one that differs in its fields `ADAPTABLE`, by its method `adapt`.

    Raises:
      UserError: if there is no such part, or its network computes something else (all differing fields listed), or
        its shapes differ.
    """
    entries = {name: entry for name, entry in config.initialize.items() if entry.source not in ("", RANDOM)}
    if not entries:
        return state
    params, variables = dict(state.params), dict(state.variables)
    for name, entry in entries.items():
        at, *inner = str(entry.get("at", name)).split("/")
        if at not in params:
            raise UserError(f"config.initialize.{name}: this objective trains {', '.join(params)}")
        wanted = _wanted(config, name)
        _check_fields(config, name, wanted)
        part = load_part(entry, config.seed)
        if inner:
            whole = dict(params[at])
            params[at] = whole
            (place,) = inner
            whole[place] = _placed(name, entry, part.params, whole[place])
            continue
        ours, theirs = create_model(**wanted), create_model(**part.model)
        if any(getattr(ours, field) != getattr(theirs, field) for field in _adaptable(ours)):
            part = dataclasses.replace(part, params=ours.adapt(part.params, theirs))
        params[name] = _placed(name, entry, part.params, params[name])
        if name in variables and part.variables:
            variables[name] = jax.tree.map(place_whole, part.variables, variables[name])
    trained = trained_params(params, config.trainable)
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


def _wanted(config: ConfigDict, name: str) -> dict[str, Any]:
    """The arguments of `create_model` of the network that an entry is for.

    Raises:
      UserError: if there is none.
    """
    part, _, inner = str(config.initialize[name].get("at", name)).partition("/")
    fields = model_of(config.models[part])
    if not inner:
        return fields
    model = create_model(**fields)
    try:
        return model.network_at(inner)
    except (AttributeError, KeyError) as error:
        said = error.args[0] if isinstance(error, KeyError) else f"{fields['name']} has no network within it"
        raise UserError(f"config.initialize.{name}.at={config.initialize[name].at!r}: {said}") from error


def _check_fields(config: ConfigDict, name: str, wanted: dict[str, Any]) -> None:
    """Raises UserError where the weights are of a network that computes something else."""
    entry = config.initialize[name]
    trained = trained_model(Run.open(find_source(entry.source)), entry.part)
    if differing := differing_fields(trained, wanted, _adaptable(create_model(**wanted))):
        raise UserError(
            f"config.initialize.{name}: {entry.source} is another network than config.models.{name}: "
            f"{'; '.join(differing)}; set the same fields"
        )


def _adaptable(model: Any) -> tuple[str, ...]:
    """The fields in which a network may differ from the one whose parameters it starts from."""
    return getattr(model, "ADAPTABLE", ())
