"""A run folder: what a training run leaves behind, and all that sampling and evaluation need.

A run whose training happened elsewhere is the same folder (`weights.pretrained` writes it):

    config.json           the keys of any run's that say what its networks are and how they are used; the rest have
                          their defaults
    weights.safetensors   in place of checkpoints: tensors "params/<part>/<path>" and
                          "variables/<part>/<collection>/<path>"
    provenance.json       where the weights are from, and their hash
    tokenizer.json        of its captions, if there is one

Frozen parts may lie in it too: their source is ".". All other files are as in any run folder.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
from beartype.door import is_bearable
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cli.config import from_json
from cli.errors import UserError
from cli.locations import Location, locate
from cli.text_files import read_text
from configs.common import get_defaults
from data.tokenizer import Tokenizer
from models import MODELS, create_model
from weights.checkpoint import CheckpointStore
from weights.files.layout import check_tensors, model_shapes
from weights.files.origin import read_json
from weights.files.tensors import check_finite, read_tensors
from weights.lora import LORA, kernels_of, merge, scale_of
from weights.power_averages import check_length, synthesize

Tree = Any

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVALUATION = "evaluation.json"
TOKENIZER = "tokenizer.json"
WRITES_WITH = "caption_tokenizer.json"  # of runs that write with another vocabulary than they read
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
PROFILE = "profile"
IDENTITY = "wandb/id"
DONE = "DONE"

WEIGHTS = "weights.safetensors"
PROVENANCE = "provenance.json"

NONFINITE = "allow_nonfinite"  # a key of PROVENANCE: values that are no numbers were let pass

OWN = "."  # the source of a frozen part that lies in the same folder

_NOT_FIELDS = ("source", "part", "step", "run")


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """Trained weights of a run.

    Attributes:
      params: {part: tree}: exponential moving average if the run keeps one and it was asked for.
      variables: {part: {collection: tree}}; may be empty.
      step: of the checkpoint.
      ema: whether `params` is the moving average, or its length where it was made after training.
      ema_error: of one that was made after training: how far its profile is from that of its length, as a share.
    """

    params: Tree
    variables: Tree
    step: int
    ema: bool | float
    ema_error: float | None = None

    def network(self, part: str) -> tuple[Tree, Tree]:
        """Parameters and variables of a part, or of a network within one by its path, such as "captioner/language"."""
        part, _, inner = part.partition("/")
        params, variables = self.params[part], self.variables.get(part, {})
        if not inner:
            return params, variables
        return params[inner], {name: tree[inner] for name, tree in variables.items() if inner in tree}

    @property
    def record(self) -> dict[str, Any]:
        """Which weights these are: {"step", "ema"}, and "ema_error" where there is one."""
        error = {} if self.ema_error is None else {"ema_error": round(self.ema_error, 6)}
        return {"step": self.step, "ema": self.ema, **error}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that exists, wherever its training happened."""

    folder: Location
    config: ConfigDict

    @classmethod
    def open(cls, folder: str | Location) -> "Run":
        """Opens a run folder.

        Raises:
          UserError: if there is none, or its config cannot be read.
        """
        return cls(locate(folder), read_config(folder))

    @property
    def converted(self) -> bool:
        """Whether its training happened elsewhere, so that it has weights and no checkpoints."""
        return (self.folder / PROVENANCE).is_file()

    def tokenizer(self, file: str = TOKENIZER) -> Tokenizer | None:
        """The tokenizer that was copied into the run, or None for a run without text."""
        path = self.folder / file
        return Tokenizer.load(path) if path.is_file() else None

    def identity(self) -> str:
        """What tells this run from every other: a random id that a copy or a move carries along, or the weights' hash.

        "" if it has none.
        """
        if self.converted:
            return str(read_json(self.folder / PROVENANCE).get("sha256", ""))
        path = self.folder / IDENTITY
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def models(self) -> dict[str, dict[str, Any]]:
        """{part: arguments of `models.create_model`} of networks whose weights are here: trained or frozen ones."""
        here = (OWN, str(self.folder))  # before and after the sources are found
        own = {part: entry for part, entry in self.config.frozen.items() if entry.get("source") in here}
        return {part: model_of(entry) for part, entry in {**self.config.models, **own}.items()}

    def latest_step(self) -> int:
        """Step of the newest checkpoint; 0 of a run whose training happened elsewhere.

        Raises:
          UserError: if there is none yet.
        """
        if self.converted:
            return 0
        steps = CheckpointStore(self.folder / CHECKPOINTS).steps()
        if not steps:
            raise UserError(f"{self.folder} has no checkpoint yet; wait for the first one or train further")
        return steps[0]

    def check_average(self, ema: float, step: int | None = None) -> None:
        """Looks, without reading weights, for what `--ema` means: 0, the parameters; 1, the average; or a length.

        Args:
          ema: the number.
          step: of the checkpoint; None for the newest.

        Raises:
          UserError: if there is no such checkpoint or average.
        """
        self.check_step(step)
        step = self.latest_step() if step is None else step
        if ema == 1 and (
            self.converted or "ema_params" not in CheckpointStore(self.folder / CHECKPOINTS).abstract(step)
        ):
            raise UserError(f"{self.folder} keeps no moving average, of which --ema=1 is; leave it out, or take 0")
        if ema not in (0, 1):
            if self.converted:
                raise UserError(f"{self.folder} was trained elsewhere and has no averages to make others of")
            check_length(self.folder, ema, step)

    def check_step(self, step: int | None) -> None:
        """Raises UserError unless there is such a checkpoint; None is any."""
        if self.converted:
            if step:
                raise UserError(f"{self.folder} was trained elsewhere and has no checkpoint {step}; set `step` to 0")
            return
        steps = CheckpointStore(self.folder / CHECKPOINTS).steps()
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} has no checkpoint {step}; it has {', '.join(map(str, steps))}")

    def load(
        self,
        step: int | None = None,
        ema: bool | float = True,
        parts: Collection[str] | None = None,
        mapped: bool = False,
    ) -> RunWeights:
        """Reads weights onto the first device.

        Args:
          step: of the checkpoint; None for the newest one, the only one (0) of a run that was trained elsewhere.
          ema: take the moving average where there is one; or the length of one that is made of those that training
            kept, see `weights.power_averages`.
          parts: which networks, of `models()`; None for those that the run trains. Of a path to a network within one,
            that one is read: see `RunWeights.network`.
          mapped: leave the weights of a run that was trained elsewhere in their file, as numpy arrays of it: they need
            no memory until they are used.

        Raises:
          UserError: if there is no such checkpoint, or the weights are missing, damaged or not those of the config.
        """
        parts = self.config.models.keys() if parts is None else {part.partition("/")[0] for part in parts}
        length = None if isinstance(ema, bool) else ema
        if self.converted:
            if length is not None:
                raise UserError(f"{self.folder} was trained elsewhere and has no averages to make others of")
            self.check_step(step)
            params, variables = self._read_weights(parts, mapped)
            return RunWeights(self._merged(params, parts), variables, step=0, ema=False)
        store = CheckpointStore(self.folder / CHECKPOINTS)
        latest = self.latest_step()
        self.check_step(step)
        step = latest if step is None else step
        stored = store.abstract(step)
        averaged, error = ({}, None) if length is None else synthesize(self.folder, length, step)
        ema = length is None and ema and "ema_params" in stored
        names = ["variables", "ema_params" if ema else "params"]
        if ema and jax.tree.structure(stored["ema_params"]) != jax.tree.structure(stored["params"]):
            names.append("params")  # there is no average of what the run does not train
        trees = store.load(step, names)
        whole = overlay(overlay(trees.get("params", {}), trees.get("ema_params", {})), averaged)
        variables = {part: tree for part, tree in trees["variables"].items() if part in parts}
        return RunWeights(self._merged(whole, parts), variables, step, ema if length is None else length, error)

    def load_pairs(self, step: int | None = None) -> tuple[Tree, int]:
        """Reads the low-rank pairs alone, {part: tree}, and the step they are of; averages where the run keeps them.

        Raises:
          UserError: if the run has none, or as `load`.
        """
        if not self.config.lora.rank:
            raise UserError(f"{self.folder} has no low-rank pairs; it was trained without config.lora")
        if self.converted:
            self.check_step(step)
            return self._read_weights((LORA,), mapped=False)[0][LORA], 0
        store = CheckpointStore(self.folder / CHECKPOINTS)
        latest = self.latest_step()
        self.check_step(step)
        step = latest if step is None else step
        names = ("params", "ema_params")
        trees = store.load(step, names)
        return overlay(trees["params"], trees["ema_params"])[LORA], step

    def _merged(self, params: Tree, parts: Collection[str]) -> Tree:
        """Those parts of a run, with what it left to its sources and its low-rank pairs, if it has any, added."""
        if not self.config.lora.rank:
            return {part: tree for part, tree in params.items() if part in parts}
        from weights.starts import load_bases  # which opens runs

        bases = load_bases(self.config, self.folder, parts)
        pairs = {part: tree for part, tree in params.get(LORA, {}).items() if part in parts}
        own = {part: tree for part, tree in params.items() if part in parts}
        return merge({**overlay(bases, own), LORA: pairs}, scale_of(self.config))

    def _read_weights(self, parts: Collection[str], mapped: bool) -> tuple[dict[str, Tree], dict[str, Tree]]:
        """Reads (params, variables) of some parts from `WEIGHTS`, after comparing all of it with the config."""
        file = self.folder / WEIGHTS
        tensors = read_tensors(file)
        wanted = {}
        for part, fields in self.models().items():
            for path, leaf in model_shapes(create_model(**fields)).items():
                collection, _, rest = path.partition("/")
                wanted[tensor_name(part, collection, rest)] = leaf
        if self.config.lora.rank:
            wanted = self._with_pairs(wanted, tensors)
        shapes = {name: leaf.shape for name, leaf in wanted.items()}
        check_tensors(f"{self.folder / CONFIG}", shapes, {name: array.shape for name, array in tensors.items()})
        check_finite(str(file), tensors, allowed=read_json(self.folder / PROVENANCE).get(NONFINITE) is True)
        trees: dict[str, dict[str, Tree]] = unflatten_dict(
            {
                # A copy, where the arrays are not wanted as they lie in the file.
                tuple(name.split("/")): array if mapped else jnp.array(array, wanted[name].dtype)
                for name, array in tensors.items()
                if name.split("/")[1] in (*parts, LORA)
            }
        )
        return trees.get("params", {}), trees.get("variables", {})

    def _with_pairs(self, wanted: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """What `WEIGHTS` of a run with low-rank pairs holds: these, and what is at no source of `config.initialize`."""
        from weights.starts import is_based

        prefix = tensor_name(LORA, "params", "")
        given = {name.removeprefix(prefix).rpartition("/")[0] for name in tensors if name.startswith(prefix)}
        if not given:
            raise UserError(f"{self.folder / WEIGHTS} has no low-rank pairs, and its config names some; convert again")
        kept = {name: leaf for name, leaf in wanted.items() if not is_based(self.config, name.removeprefix("params/"))}
        for part, entry in self.config.models.items():
            for path, kernel in kernels_of(create_model(**model_of(entry))).items():
                if (module := f"{part}/{path.removesuffix('/kernel')}") in given:
                    for side, shape in kernel.pair_shapes(self.config.lora.rank).items():
                        kept[f"{prefix}{module}/{side}"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return kept


def overlay(params: Tree, leaves: Tree) -> Tree:
    """Returns a tree of dicts with those of `leaves` in the place of its own.

    Args:
      params: nested dicts.
      leaves: nested dicts, of which some or all of the same paths have a value.
    """
    return unflatten_dict({**flatten_dict(params, keep_empty_nodes=True), **flatten_dict(leaves)})


def tensor_name(part: str, collection: str, path: str) -> str:
    """What a leaf of a network is called in `WEIGHTS`."""
    return f"params/{part}/{path}" if collection == "params" else f"variables/{part}/{collection}/{path}"


def model_of(part_config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Returns the arguments of `create_model` in `config.frozen.<part>` or `config.models.<part>`."""
    return {key: value for key, value in part_config.items() if key not in _NOT_FIELDS}


def read_config(folder: str | Location) -> ConfigDict:
    """Reads the config of a run folder. Keys that the folder lacks, as later versions added them, have their defaults.

    Raises:
      UserError: if there is none, it cannot be read, or a key has a value of another type than it may.
    """
    folder = locate(folder)
    path = folder / CONFIG
    if not path.is_file():
        what = "is not a run folder (it has no config.json)" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{folder} {what}; train one with `python -m train --config=... --workdir={folder}`, or convert weights "
            f"with `python -m scripts.convert --input=... --output={folder}`"
        )
    try:
        text = read_text(path)
        if not isinstance(json.loads(text), dict):
            raise ValueError("it is no object")
        config = from_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not the JSON of a config ({error}); restore it or train again") from error
    problems: list[str] = []
    _add_missing(config, get_defaults(), "", problems)
    if not problems:
        for group in ("models", "frozen"):
            for part, entry in config[group].items():
                problems += _network_problems(f"{group}.{part}", entry)
    if problems:
        raise UserError(f"{path} is not a config of a run: {'; '.join(problems)}; restore it or train again")
    return config


def _add_missing(config: ConfigDict, defaults: ConfigDict, prefix: str, problems: list[str]) -> None:
    """Adds the keys of `defaults` that `config` has not, and says which others are of another type than there."""
    with config.ignore_type():
        for key, default in defaults.items():
            value = config.get(key, default)
            kinds = (int, float) if type(default) is float else (type(default),)
            if type(value) not in kinds:
                wanted = "an object" if isinstance(default, ConfigDict) else f"such as {default!r}"
                shown = "an object" if isinstance(value, ConfigDict) else repr(value)
                problems.append(f"{prefix}{key} is {shown}; it must be {wanted}")
            elif key not in config:
                config[key] = value
            elif isinstance(default, ConfigDict):
                _add_missing(value, default, f"{prefix}{key}.", problems)


def _network_problems(where: str, entry: Any) -> list[str]:
    """What `models.create_model` would not take of a part's entry."""
    if not isinstance(entry, ConfigDict):
        return [f"{where} is {entry!r}; it must be an object"]
    name = entry.get("name")
    if not isinstance(name, str) or name not in MODELS:
        shown = "an object" if isinstance(name, ConfigDict) else repr(name)
        return [f"{where}.name is {shown}; it must be one of {', '.join(MODELS)}"]
    hints = get_type_hints(MODELS[name])
    problems = []
    for key, value in model_of(entry).items():
        if key == "name":
            continue
        if key not in hints or key == "parent":
            problems.append(f"{where}.{key} is no field of {name}")
        elif not _is_of(value, hint := hints[key]):
            shown = "an object" if isinstance(value, ConfigDict) else repr(value)
            problems.append(f"{where}.{key} is {shown}; it must be {getattr(hint, '__name__', None) or hint}")
    return problems


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a config's value is of an annotated type: a whole number is a number, true is none."""
    if type(value) is bool:
        return "bool" in str(hint) or hint is Any
    return is_bearable(value, hint) or (type(value) is int and is_bearable(float(value), hint))


def read_metrics(folder: str | Location) -> list[dict[str, Any]]:
    """Reads the rows of a run's metrics.jsonl, oldest first; a last line that a crash cut short is left out."""
    path = locate(folder) / METRICS
    rows = []
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break
    return rows
