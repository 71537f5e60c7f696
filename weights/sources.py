"""Where a trained part comes from: a run folder, or random weights for tests and measurements."""

import dataclasses
import functools
import logging
from collections.abc import Collection
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import Location, absolute, is_bucket, locate
from models import MODELS, create_model
from weights.run import OWN, Run, model_of

Tree = Any

RANDOM = "random"
# Fields of networks that say how they compute or start, and not what they compute from their weights.
_FREE_FIELDS = {
    *("dtype", "param_dtype", "implementation", "scan", "remat", "dropout", "logit_scale_init", "code_range"),
    *("name", "parent"),
}
# Fields of a first stage that its weights do not decide: a second stage may be published with other values.
_SCALE_FIELDS = ("latent_shift", "latent_scale")


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


def find_source(source: str, near: Location | None = None) -> str:
    """Returns the folder that `source` names.

    A run is often moved together with the runs it depends on, so a folder that is gone is looked for beside the run
    that names it.

    Args:
      source: a run folder, or "random"; "." is the folder `near` itself.
      near: the run folder whose config names `source`.

    Raises:
      UserError: if there is no such folder, or nothing beside the run where its store cannot be reached.
    """
    if source == OWN and near is not None:
        return str(near)
    if source == RANDOM:
        return source
    looked, refusal = [], None
    try:
        looked.append(locate(source))
        if (looked[0] / "config.json").is_file():
            return str(looked[0])
    except UserError as error:  # such as a bucket that is out of reach, from which the runs were moved here
        refusal = error
    if near is not None and not is_bucket(near):
        looked.append(absolute(near).parent / PurePath(source).name)
        if (looked[-1] / "config.json").is_file():
            return str(looked[-1])
    if refusal is not None:
        raise refusal
    raise UserError(
        f"the source {source} is missing (looked in {' and '.join(map(str, looked))}); train or convert it first, or "
        "set another `source`"
    )


def differing_fields(trained: dict[str, Any], wanted: dict[str, Any], adaptable: Collection[str] = ()) -> list[str]:
    """Says in which fields a trained network computes something else than the wanted one, "field: theirs, not ours".

    What a field is when it is left out, the network says. Weights of equal shapes may need different networks: nothing
    but the field tells one activation from another.

    Args:
      trained: {name, fields} of the network that the weights are of.
      wanted: {name, fields} of the one that is to have them.
      adaptable: fields that may differ.
    """
    if trained["name"] != wanted["name"]:
        return [f"name: {trained['name']!r}, not {wanted['name']!r}"]
    theirs, ours = create_model(**trained), create_model(**wanted)
    return [
        f"{field}: {getattr(theirs, field)!r}, not {getattr(ours, field)!r}"
        for field in ours.__dataclass_fields__
        if field not in (*_FREE_FIELDS, *adaptable) and getattr(theirs, field) != getattr(ours, field)
    ]


def resolve_frozen(config: ConfigDict, near: Location | None = None) -> None:
    """Fills `config.frozen.<part>` with the network's arguments as its source trained it, and pins its checkpoint.

    Afterwards the config alone says which networks there are, and `run` and `step` say with which weights: a source
    that is trained further does not change the runs that use it, nor does another run take its place. What the config
    said before of a network that was trained elsewhere only serves to describe it without its run. Two things stay: how
    it computes (dtype, attention's implementation), as the config has it where the source does not say; and how latents
    are scaled, `latent_shift` and `latent_scale`, as the config has them where it does, with a warning where the source
    has others.

    Args:
      config: changed in place. An entry's `step` of 0 means the newest checkpoint.
      near: see `find_source`.

    Raises:
      UserError: if a source is missing or has no such part or checkpoint, or was trained on another network than the
        config has beside it.
    """
    sources = {}
    for part, entry in config.frozen.items():
        if entry.source == RANDOM:
            continue
        folder = find_source(entry.source, near)
        source = sources[part] = Run.open(folder)
        trained = trained_model(source, entry.part)
        trained |= _said_scale(entry, trained, folder)
        with config.unlocked(), entry.ignore_type():
            for key in model_of(entry).keys() - trained.keys() - _FREE_FIELDS:
                del entry[key]
            for key, value in trained.items():
                entry[key] = value
            entry.source = folder
            entry.step = entry.get("step", 0) or source.latest_step()
            entry.run = source.identity()
    for part, source in sources.items():
        _check_trained_on(config, part, source)


def _check_trained_on(config: ConfigDict, part: str, source: Run) -> None:
    """Raises UserError if a part's run had another network frozen under a name that the config has, too.

    A captioner reads the features of the CLIP that it was trained on, and those of an equally large one mean others.
    Parts that were converted together do not say which run they are of.
    """
    for name, theirs in source.config.frozen.items():
        ours = config.frozen.get(name)
        if ours is None or not (ours.get("run") and theirs.get("run")):
            continue
        if (ours.run, ours.step) != (theirs.run, theirs.step):
            raise UserError(
                f"config.frozen.{part} was trained on {name} of {theirs.source} at step {theirs.step}, and "
                f"config.frozen.{name} is of {ours.source} at step {ours.step}; set its source and step to the former"
            )


def _said_scale(entry: ConfigDict, trained: dict[str, Any], folder: str) -> dict[str, float]:
    """Those of `_SCALE_FIELDS` that the network has and an entry sets: without a scale, none."""
    if entry.get("latent_scale") is None:
        if entry.get("latent_shift"):
            raise UserError(
                f"part {entry.part!r}: latent_shift is {entry.latent_shift} without a latent_scale, and without one "
                f"both are as {folder} has them; set latent_scale too"
            )
        return {}
    known = MODELS[trained["name"]].__dataclass_fields__
    said = {key: entry[key] for key in _SCALE_FIELDS if key in known and entry.get(key) is not None}
    theirs = create_model(**trained) if said and not entry.get("run", "") else None  # once, when a run begins
    for key, value in said.items() if theirs is not None else ():
        if (other := getattr(theirs, key)) != value:
            logging.getLogger(__name__).warning(
                "part %r: %s is %s as the config says, not %s as %s does",
                *(entry.part, key, value, "what was measured" if other is None else other, folder),
            )
    return said


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
        Collections that it lacks are left out, such as what was measured of latents whose scale the config says.

    Raises:
      UserError: if the source is missing or has no such part.
    """
    if entry.source == RANDOM:
        _warn_of_random(entry.part)
        model = model_of(entry)
        shardings = None if abstract is None else jax.tree.map(lambda leaf: leaf.sharding, abstract)
        trees = jax.jit(lambda: random_part(model, seed).trees(), out_shardings=shardings)()
        return Part(model, **trees)
    source = Run.open(find_source(entry.source))
    model = trained_model(source, entry.part)
    weights = source.load(entry.get("step", 0) or None, parts=(entry.part,))
    part = Part(model, *weights.network(entry.part))
    if abstract is None:
        return part
    wanted = {name: tree for name, tree in part.variables.items() if name in abstract["variables"]}
    return Part(model, **jax.tree.map(place_whole, {**part.trees(), "variables": wanted}, abstract))


@functools.cache
def _warn_of_random(part: str) -> None:
    """Once a process, however often a part is loaded: its weights are hashed, too, to find what was stored of them."""
    logging.getLogger(__name__).warning("part %r has random weights, as its source says", part)


def place_whole(value: Any, like: Any) -> jax.Array:
    """Places an array that every process holds whole, with the dtype and sharding of `like`."""
    whole = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(whole.shape, like.sharding, lambda index: whole[index])


def random_part(model: dict[str, Any], seed: int) -> Part:
    """Initializes a network; traceable."""
    network = create_model(**model)
    inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.example_inputs(1))
    variables = dict(network.init(jax.random.key(seed), *inputs))
    return Part(model, variables.pop("params"), variables)


def trained_model(source: Run, part: str) -> dict[str, Any]:
    """Returns the arguments of `create_model` of a part, or of a network within one by its path ("captioner/language").

    Raises:
      UserError: if the source has no such part.
    """
    models = source.models()
    whole, _, inner = part.partition("/")
    if whole not in models:
        raise UserError(f"{source.folder} has no part {whole!r}; it has {', '.join(models)}")
    try:
        return model_within(models[whole], inner)
    except KeyError as error:
        raise UserError(f"{source.folder}: {error.args[0]}") from error


def model_within(model: dict[str, Any], path: str) -> dict[str, Any]:
    """Returns the arguments of `create_model` of a network within another; those of itself if the path is empty.

    Raises:
      KeyError: if there is none; says so.
    """
    if not path:
        return model
    network = create_model(**model)
    if not hasattr(network, "network_at"):
        raise KeyError(f"{model['name']} has no network within it")
    return network.network_at(path)
