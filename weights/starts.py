"""Where the parameters of a run start, `config.initialize`; and what a run of low-rank pairs leaves to its sources.

A run that trains pairs (`weights.lora`) beside a network does not change it, so its checkpoints leave out what came
from a source, and whoever opens them adds it again. The source's checkpoint and identity are pinned when the run
begins: another run in its place is refused.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import Location
from models import MODELS, create_model
from weights.files.layout import model_shapes
from weights.fingerprint import differing, differing_networks
from weights.lora import LORA
from weights.run import Run, model_of
from weights.sources import (
    RANDOM,
    Part,
    differing_fields,
    find_source,
    load_part,
    model_within,
    resolve_frozen,
    trained_model,
)

Tree = Any

# Frozen networks whose outputs others learn, as configs call them; and those of which latents alone are learned.
_STAGES = ("first_stage", "dvae", "text", "clip", "captioner")
_LATENTS = ("first_stage", "captioner")


@dataclasses.dataclass(frozen=True)
class Start:
    """Trained weights that a network of a run starts from.

    Attributes:
      entry: `config.initialize.<name>`: {source, part}, perhaps "at", "step" and "run".
      name: of the entry.
      at: the path that its parameters have in the run: a part, or a network within one.
    """

    entry: ConfigDict
    name: str
    at: str

    @property
    def part(self) -> str:
        """Of the run."""
        return self.at.partition("/")[0]

    def source(self, near: Location | None = None) -> Run:
        """The folder, looked for beside `near` too where it is gone.

        Raises:
          UserError: if it is missing, or not the one that the run began with.
        """
        source = Run.open(find_source(self.entry.source, near))
        if (begun := self.entry.get("run", "")) and source.identity() != begun:
            raise UserError(
                f"config.initialize.{self.name}: {source.folder} is another run, or has other weights, than the one "
                "that this run began with and adds to; put that one back"
            )
        return source

    def load(self, config: ConfigDict, near: Location | None = None) -> Part:
        """Its weights, for the network that the run has in that place.

        Raises:
          UserError: if there are none, or they are of a network that computes something else (all differing fields
            listed).
        """
        if self.adopted(config):
            return self._adopt(config, near)
        wanted, source = self.model(config), self.source(near)
        ours = create_model(**wanted)
        adaptable = getattr(ours, "ADAPTABLE", ())  # fields in which the network of the weights may differ
        if differing := differing_fields(trained_model(source, self.entry.part), wanted, adaptable):
            raise UserError(
                f"config.initialize.{self.name}: {self.entry.source} is another network than "
                f"config.models.{self.name}: {'; '.join(differing)}; set the same fields"
            )
        found = ConfigDict({**self.entry, "source": str(source.folder)})
        part = load_part(found, config.seed)
        theirs = create_model(**part.model)
        if any(getattr(ours, field) != getattr(theirs, field) for field in adaptable):
            try:
                part = dataclasses.replace(part, params=ours.adapt(part.params, theirs))
            except ValueError as error:
                raise UserError(f"config.initialize.{self.name}: {self.entry.source}: {error}") from error
        return part

    def adopted(self, config: ConfigDict) -> bool:
        """Whether it gives some of the parameters in its place, made of those of another kind of network."""
        part, _, inner = self.at.partition("/")
        name = config.models[part].name if part in config.models else ""
        return bool(inner) and name in MODELS and inner in getattr(MODELS[name], "ADOPTS", ())

    def _adopt(self, config: ConfigDict, near: Location | None) -> Part:
        part, _, inner = self.at.partition("/")
        source = self.source(near)
        model = trained_model(source, self.entry.part)
        found = load_part(ConfigDict({**self.entry, "source": str(source.folder)}), config.seed)
        ours = create_model(**model_of(config.models[part]))
        try:
            return Part(model, ours.adopt(inner, found.params, create_model(**model)), {})
        except ValueError as error:
            raise UserError(f"config.initialize.{self.name}: {self.entry.source} does not fit: {error}") from error

    def model(self, config: ConfigDict) -> dict[str, Any]:
        """The arguments of `create_model` of the network that it is for; raises UserError if there is none."""
        part, _, inner = self.at.partition("/")
        try:
            return model_within(model_of(config.models[part]), inner)
        except KeyError as error:
            raise UserError(f"config.initialize.{self.name}.at={self.entry.at!r}: {error.args[0]}") from error


def starts_of(config: ConfigDict) -> list[Start]:
    """Those of a config, without random ones; a network within another comes after it."""
    found = [
        Start(entry, name, str(entry.get("at", name)))
        for name, entry in config.initialize.items()
        if entry.source not in ("", RANDOM)
    ]
    return sorted(found, key=lambda start: start.at.count("/"))


def other_stages(start: Start, config: ConfigDict) -> list[str]:
    """Says which frozen networks the trained weights of a start learned beside, and the run has others in place of.

    Latents, tokens or features of another network are other data, though their shapes agree.

    Args:
      start: of the run.
      config: of the run, its frozen parts resolved.

    Returns:
      A line for each.
    """
    source, ours, lines = start.source(), config.get("frozen", {}), []
    for name in _STAGES if start.part != "text" else ():  # what reads captions sees none of them
        theirs, told = source.config.frozen.get(name), f"config.initialize.{start.name}: {start.entry.source} learned"
        if name == "first_stage" and (theirs is None) != (name not in ours) and not source.converted:
            kinds = ("latents", "pixels") if name in ours else ("pixels", "latents")
            lines.append(f"{told} {kinds[1]}, and this run learns {kinds[0]}")
        if theirs is None or name not in ours:
            continue
        found = _differing_stage(theirs, ours[name], source.folder, name in _LATENTS)
        if found:
            lines.append(
                f"{told} with {name} of {theirs.source} at step {theirs.get('step', 0)}, and config.frozen.{name} is "
                f"of {ours[name].source} at step {ours[name].get('step', 0)}: {'; '.join(found)}; take the former, "
                "unless it is to learn anew what these make"
            )
    return lines


def _differing_stage(theirs: ConfigDict, ours: ConfigDict, near: Location, latents: bool) -> list[str]:
    """What a frozen part of a run folder computes otherwise than one of this run, by the entries of both configs."""
    found = ConfigDict({"frozen": {"stage": theirs.to_dict()}})
    try:
        resolve_frozen(found, near)
        entry = found.frozen.stage
        if (begun := theirs.get("run", "")) and begun != entry.get("run"):  # "" of what lies in the same folder
            return [f"which of them it was cannot be told, as another run is at {entry.source} now"]
        if all(entry.get(key) == ours.get(key) for key in ("source", "run", "step", "part")):
            return differing_fields(model_of(entry), model_of(ours))  # such as how latents are scaled
        if fields := differing_networks(model_of(entry), model_of(ours), latents):
            return fields
        return differing(_on_host(entry), _on_host(ours), latents)
    except UserError as error:
        return [f"they cannot be compared, as {error}"]


def _on_host(entry: ConfigDict) -> Part:
    """A frozen part in the host's memory: what is compared would stand on the device beside all that trains."""
    return Part(model_of(entry), **jax.device_get(load_part(entry).trees()))


def bases_of(config: ConfigDict) -> list[Start]:
    """Those whose parameters a run of pairs leaves to their sources, all of a place; none of another run."""
    return [start for start in starts_of(config) if not start.adopted(config)] if config.lora.rank else []


def pin_bases(config: ConfigDict, near: Location | None = None) -> None:
    """Writes folder, checkpoint and identity of what pairs are added to into `config.initialize.<name>`.

    Args:
      config: changed in place. An entry's `step` of 0 means the newest checkpoint.
      near: see `find_source`.

    Raises:
      UserError: see `Start.source`; or if it has no such part, or another network's parameters replace some of its,
        which no checkpoint would keep.
    """
    bases = bases_of(config)
    for start in starts_of(config):
        over = next((base for base in bases if start not in bases and start.at.startswith(f"{base.at}/")), None)
        if over is not None:
            raise UserError(
                f"config.initialize.{start.name}.source would replace what config.initialize.{over.name}.source gives, "
                "and low-rank pairs leave that where it is; leave out one of them, or set config.lora.rank=0"
            )
    for start in bases:
        source = start.source(near)
        trained_model(source, start.entry.part)
        with config.unlocked():
            start.entry.source = str(source.folder)
            start.entry.step = start.entry.get("step", 0) or source.latest_step()
            start.entry.run = source.identity()


def is_based(config: ConfigDict, path: str) -> bool:
    """Whether a parameter, by its path with the part, is of what `bases_of` gives."""
    return not path.startswith(f"{LORA}/") and any(path.startswith(f"{base.at}/") for base in bases_of(config))


def load_bases(config: ConfigDict, near: Location | None = None, parts: Collection[str] | None = None) -> Tree:
    """The parameters of `bases_of`, {part: tree}, in the dtypes of the run's networks: a source may have stored less.

    Args:
      config: of the run.
      near: see `find_source`.
      parts: of the run, which are wanted; None for all.

    Raises:
      UserError: see `Start.load`.
    """
    flat: dict[str, Any] = {}
    for base in bases_of(config):
        if parts is not None and base.part not in parts:
            continue
        leaves: dict[str, Any] = flatten_dict(base.load(config, near).params, sep="/")
        shapes = model_shapes(create_model(**base.model(config)))
        flat |= {f"{base.at}/{path}": leaf.astype(shapes[f"params/{path}"].dtype) for path, leaf in leaves.items()}
    return unflatten_dict(flat, sep="/")
