"""Where a trained part comes from: a run folder, or random weights for tests and measurements."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cli.errors import UserError
from models import create_model
from weights.run import Run

Tree = Any

RANDOM = "random"
_NOT_FIELDS = ("source", "part", "step", "run")


@dataclasses.dataclass(frozen=True)
class Part:
    """One network with weights.

    Attributes:
      model: {name, ...}: arguments of `models.create_model`.
      params: the network's parameters.
      variables: {collection: tree}; may be empty.
    """

    model: dict[str, Any]
    params: Tree
    variables: Tree

    def trees(self) -> dict[str, Tree]:
        """What an objective or a sampler takes as `frozen[part]`."""
        return {"params": self.params, "variables": self.variables}


def model_of(part_config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of `create_model` in `config.frozen.<part>` or `config.models.<part>`."""
    return {key: value for key, value in part_config.items() if key not in _NOT_FIELDS}


def find_source(source: str, near: Path | None = None) -> str:
    """Returns the folder that `source` names.

    A run is often moved together with the runs it depends on, so a folder that is gone is looked for beside the run
    that names it.

    Args:
      source: a run folder, or "random".
      near: the run folder whose config names `source`.

    Raises:
      UserError: if there is no such folder.
    """
    candidates = [Path(source)] + ([near.resolve().parent / Path(source).name] if near is not None else [])
    for candidate in candidates:
        if source == RANDOM or (candidate / "config.json").is_file():
            return source if source == RANDOM else str(candidate)
    places = " and ".join(str(path) for path in candidates)
    raise UserError(f"the frozen stage {source} is missing (looked in {places}); train it first or set its `source`")


def resolve_frozen(config: ConfigDict, near: Path | None = None) -> None:
    """Fills `config.frozen.<part>` with the network's arguments as its source trained it, and pins its checkpoint.

    Afterwards the config alone says which networks there are, and `run` and `step` say with which weights: a source
    that is trained further does not change the runs that use it, nor does another run take its place. What the config
    said before of a network that was trained elsewhere only serves to describe it without its run.

    Args:
      config: changed in place. An entry's `step` of 0 means the newest checkpoint.
      near: see `find_source`.

    Raises:
      UserError: if a source is missing or has no such part or checkpoint.
    """
    for entry in config.frozen.values():
        if entry.source == RANDOM:
            continue
        folder = find_source(entry.source, near)
        run = Run.open(folder)
        trained = _trained_model(run, entry.part)
        with config.unlocked():
            for key, value in trained.items():
                entry[key] = value
            entry.source = folder
            entry.step = entry.get("step", 0) or run.latest_step()
            entry.run = run.identity()


def load_frozen(config: ConfigDict, seed: int = 0, abstract: Tree = None) -> dict[str, dict[str, Tree]]:
    """Loads every part of a resolved `config.frozen`: {part: {"params": tree, "variables": tree}}.

    Args:
      config: the experiment.
      seed: of parts whose source is "random".
      abstract: `abstract_frozen` with shardings, onto which the parts are loaded; None for the first device.
    """
    return {part: load_part(entry, seed, abstract and abstract[part]).trees() for part, entry in config.frozen.items()}


def abstract_frozen(config: ConfigDict) -> dict[str, dict[str, Tree]]:
    """Shapes of `load_frozen`, without reading or allocating anything."""
    return {
        part: jax.eval_shape(lambda entry=entry: random_part(model_of(entry), 0).trees())
        for part, entry in config.frozen.items()
    }


def load_part(entry: ConfigDict, seed: int = 0, abstract: Tree = None) -> Part:
    """Loads one part from {name, ..., source, part, step}; a step of 0 or none is the newest.

    Args:
      entry: names the part.
      seed: of a part whose source is "random".
      abstract: {"params", "variables"} by shape and sharding, onto which it is loaded; None for the first device.

    Raises:
      UserError: if the source is missing or has no such part.
    """
    if entry.source == RANDOM:
        logging.getLogger(__name__).warning("part %r has random weights, as its source says", entry.part)
        model = model_of(entry)
        if abstract is None:
            return random_part(model, seed)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        trees = jax.jit(lambda: random_part(model, seed).trees(), out_shardings=shardings)()
        return Part(model, **trees)
    run = Run.open(find_source(entry.source))
    model = _trained_model(run, entry.part)
    weights = run.load(entry.get("step", 0) or None)
    part = Part(model, weights.params[entry.part], weights.variables.get(entry.part, {}))
    if abstract is None:
        return part
    return Part(model, **jax.tree.map(place_whole, part.trees(), abstract))


def place_whole(value: Any, like: Any) -> jax.Array:
    """Places an array that every process holds whole, with the dtype and sharding of `like`."""
    whole = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(whole.shape, like.sharding, lambda index: whole[index])


def random_part(model: dict[str, Any], seed: int) -> Part:
    """Initializes a network; traceable."""
    network = create_model(**model)
    inputs = [jnp.zeros(x.shape, x.dtype) for x in network.example_inputs(1)]
    variables = dict(network.init(jax.random.key(seed), *inputs))
    return Part(model, variables.pop("params"), variables)


def _trained_model(run: Run, part: str) -> dict[str, Any]:
    if part not in run.config.models:
        raise UserError(f"{run.folder} has no part {part!r}; it has {', '.join(run.config.models.keys())}")
    return model_of(run.config.models[part])
