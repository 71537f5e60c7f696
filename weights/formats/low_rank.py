"""Low-rank pairs as the projects around PyTorch store them, in and out: what the formats that hold them share.

They have a pair A [rank, in], B [out, rank] for each projection, a convolution's with windows, A [rank, in, h, w] and
B [out, rank, 1, 1]. Ours of queries, keys and values that are projected together are stacked, so each of theirs has its
place in both directions; a rank below the largest is filled up with zeros, and factors that differ between modules are
taken into B.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cli.config import to_json
from cli.errors import UserError
from cli.locations import absolute
from configs.common import get_defaults
from models import create_model
from models.clip_text import ClipText
from models.unet import UNet
from weights.files.layout import Layout, Tensors
from weights.files.origin import Origin
from weights.formats import clip_text
from weights.formats.contract import Adaptation, Converted, Tree
from weights.formats.diffusers_unet import unet_layout
from weights.lora import LORA, Kernel, kernels_of
from weights.run import OWN, Run, model_of
from weights.sources import resolve_frozen

NETWORKS = ("unet", "clip_text")
OPTIONS = {"base": "of low-rank pairs: the run folder or folder of converted weights that they add to"}

_SHOWN = 4  # names in an error

# Ends of names -> side. Groups: the module's name.
_SIDES = (
    (r"(.+)\.lora_A(?:\.\w+)?\.weight", "A"),
    (r"(.+)\.lora_B(?:\.\w+)?\.weight", "B"),
    (r"(.+?)(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight|(.+)\.lora_down\.weight", "A"),
    (r"(.+?)(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight|(.+)\.lora_up\.weight", "B"),
    (r"(.+?)(?:\.lora|_lora|\.lora_linear_layer)?\.alpha", "alpha"),
)
# In old files attention is called as in the UNet everywhere, and its last projection without a number.
_OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclasses.dataclass(frozen=True)
class ForeignPair:
    """One module's pair elsewhere.

    Attributes:
      down: A, [rank, in] or [rank, in, h, w].
      up: B, [out, rank] or [out, rank, 1, 1].
      scale: what their product counts.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """Of both."""
        return rank_of(self.down)


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where a module of theirs is in a network of ours: a kernel, and which of what it joins."""

    path: str
    place: int
    kernel: Kernel


def rank_of(down: np.ndarray) -> int:
    """The rank that A says, at least 1; whether its shape is right is seen later."""
    return max((1, *down.shape[:1]))


def is_pair_name(name: str) -> bool:
    """Whether a tensor's name is one of a pair's."""
    return any(side != "alpha" and re.fullmatch(pattern, name) for pattern, side in _SIDES)


def split_names(what: str, tensors: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Tensors by module: {module: {"A", "B", perhaps "alpha"}}.

    Raises:
      UserError: if a name is of nothing such, or a module has one side alone.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, array in tensors.items():
        for pattern, side in _SIDES:
            if match := re.fullmatch(pattern, name):
                module = next(group for group in match.groups() if group).replace(".processor.", ".")
                modules.setdefault(module, {})[side] = np.asarray(array)
                break
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{what} holds what is no low-rank pair: {_some(unknown)}; only plain pairs are converted")
    if lonely := [module for module, sides in modules.items() if not {"A", "B"} <= sides.keys()]:
        raise UserError(f"{what} has one half of a pair alone for {_some(lonely)}; fetch it again")
    if not modules:
        raise UserError(f"{what} holds no low-rank pairs")
    return modules


def read_run(
    origin: Origin, what: str, base: str, pairs: Mapping[str, Mapping[str, ForeignPair]], notes: tuple[str, ...] = ()
) -> Converted:
    """A run of pairs beside the networks of another run.

    Args:
      origin: where the pairs are from.
      what: names the file.
      base: the folder of that run.
      pairs: {kind of network: {name of their module: pair}}: "unet" and "clip_text", or "" for whichever has the
        modules.
      notes: what a user should know.

    Raises:
      UserError: if there is no such run, it has no such network or modules, or shapes differ.
    """
    if not base:
        raise UserError(f"{origin.describe()} holds low-rank pairs, which add to a network: give its folder as --base")
    run = Run.open(base)
    resolve_frozen(run.config, near=run.folder)
    networks: dict[str, tuple[Any, dict[str, _Target]]] = {}
    for part, fields in {**run.config.models, **run.config.frozen}.items():
        if fields["name"] in NETWORKS:
            model = create_model(**model_of(fields))
            networks[part] = model, _targets(model)
    found: dict[str, dict[str, ForeignPair]] = {}
    for kind, modules in pairs.items():
        for name, pair in modules.items():
            part, target = _find(what, base, networks, kind, name)
            found.setdefault(part, {})[f"{target.path} {target.place}"] = _checked(what, name, pair, target.kernel)
    rank = max(pair.rank for modules in found.values() for pair in modules.values())
    scales = {pair.scale for modules in found.values() for pair in modules.values()}
    scale = min(scales) if len(scales) == 1 and min(scales) > 0 else 1.0
    trees = {part: _ours(networks[part][0], modules, rank, scale) for part, modules in found.items()}
    return Converted(
        _config(run, {part: set(flatten_dict(tree, sep="/")) for part, tree in trees.items()}, rank, scale),
        {LORA: trees},
        tokenizer=run.tokenizer(),
        notes=(f"pairs of rank {rank} beside {sum(map(len, found.values()))} projections of {run.folder}", *notes),
    )


def write_modules(adaptation: Adaptation, part: str, scale: float) -> dict[str, dict[str, np.ndarray]]:
    """The pairs of a network by their modules: {name of their module: {"A", "B"}}, float32.

    Args:
      adaptation: of a run.
      part: of it.
      scale: what B is multiplied by.

    Raises:
      UserError: if the layout has no place for a module.
    """
    model = adaptation.models[part]
    kernels, layout = kernels_of(model), _layout(model)
    modules = {}
    flat: dict[str, Any] = flatten_dict(adaptation.pairs[part], sep="/")
    for path in (path.removesuffix("/down") for path in flat if path.endswith("/down")):
        kernel = kernels[f"{path}/kernel"]
        down, up = (np.asarray(flat[f"{path}/{side}"], np.float32) for side in ("down", "up"))
        names = layout.names(f"{path}/kernel")
        apart = zip(down, up, strict=True) if kernel.joint else ((down, up),)
        for name, (a, b) in zip(names, apart, strict=True):
            inputs, outputs = a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T * np.float32(scale)
            if kernel.window:
                inputs, outputs = a.transpose(3, 2, 0, 1), outputs[..., None, None]
            modules[name.removesuffix(".weight")] = {"A": inputs.copy(), "B": outputs.copy()}
    return modules


def _layout(model: Any) -> Layout:
    return unet_layout(model) if isinstance(model, UNet) else clip_text.LAYOUT


def _targets(model: Any) -> dict[str, _Target]:
    """{name of their module: where it is}, also with the underscores that some files have for dots."""
    layout, targets = _layout(model), {}
    for path, kernel in kernels_of(model).items():
        for place, name in enumerate(layout.names(path)):
            target = _Target(path.removesuffix("/kernel"), place, kernel)
            module = name.removesuffix(".weight")
            targets |= {module: target, module.replace(".", "_"): target}
    return targets


def _find(
    what: str, base: str, networks: Mapping[str, tuple[Any, Mapping[str, _Target]]], kind: str, name: str
) -> tuple[str, _Target]:
    """(part, place) of a module."""
    wanted = {"unet": UNet, "clip_text": ClipText}
    for part, (model, targets) in networks.items():
        if kind and not isinstance(model, wanted[kind]):
            continue
        tried = [name, f"{name}.0", f"text_model.{name}"]
        head, dot, last = name.rpartition(".")
        if isinstance(model, ClipText) and last in _OLD_NAMES:
            tried += [f"{each}{dot}{_OLD_NAMES[last]}" for each in (head, f"text_model.{head}")]
        if place := next((targets[each] for each in tried if each in targets), None):
            return part, place
    kinds = ", ".join(f"{part} ({type(model).__name__})" for part, (model, _) in networks.items()) or "no such network"
    raise UserError(f"{what} has a pair for {name}, and {base} has {kinds} without that module; it is of another one")


def _checked(what: str, name: str, pair: ForeignPair, kernel: Kernel) -> ForeignPair:
    """A pair in the forms A [rank, in] or [rank, in, h, w], and B [out, rank]. Raises UserError if shapes differ."""
    shapes, rank = kernel.pair_shapes(pair.rank), pair.rank
    joint = 1 if kernel.joint else 0
    inputs, outputs = shapes["down"][joint:-1], shapes["up"][joint + 1 :]
    wanted = (rank, inputs[-1], *inputs[:-1]) if kernel.window else (rank, int(np.prod(inputs)))
    out = (int(np.prod(outputs)), rank)
    down, up = pair.down, pair.up
    if not kernel.window and down.ndim == 4 and down.shape[2:] == (1, 1):
        down = down[..., 0, 0]
    if kernel.window and down.ndim == 2 and wanted[2:] == (1, 1):
        down = down[..., None, None]
    if up.ndim == 4 and up.shape[2:] == (1, 1):
        up = up[..., 0, 0]
    if down.shape != wanted or up.shape != out:
        raise UserError(
            f"{what}: the pair of {name} is {pair.down.shape} and {pair.up.shape}, and its network takes {wanted} and "
            f"{out}; it is of another one"
        )
    return ForeignPair(down.astype(np.float32), up.astype(np.float32), pair.scale)


def _ours(model: Any, modules: Mapping[str, ForeignPair], rank: int, scale: float) -> Tree:
    """The tree of a network's pairs, {"<path> <place>": pair} filled up to a rank, to be multiplied by `scale`."""
    kernels, tree = kernels_of(model), {}
    for path in dict.fromkeys(name.partition(" ")[0] for name in modules):
        kernel = kernels[f"{path}/kernel"]
        sides = {side: np.zeros(shape, np.float32) for side, shape in kernel.pair_shapes(rank).items()}
        for place in range(kernel.shape[kernel.inputs] if kernel.joint else 1):
            if (pair := modules.get(f"{path} {place}")) is None:
                continue
            down, up = (sides[side][place] if kernel.joint else sides[side] for side in ("down", "up"))
            a = pair.down.transpose(2, 3, 1, 0) if kernel.window else pair.down.T
            down[..., : pair.rank] = a.reshape(*down.shape[:-1], pair.rank)
            b = pair.up if pair.scale == scale else pair.up * np.float32(pair.scale / scale)
            up[: pair.rank] = b.T.reshape(pair.rank, *up.shape[1:])
        tree |= {f"{path}/{side}": jnp.asarray(value) for side, value in sides.items()}
    return unflatten_dict(tree, sep="/")


def _config(base: Run, paths: Mapping[str, set[str]], rank: int, scale: float) -> dict[str, Any]:
    """The config of a run of pairs beside `base`, whose frozen parts lie where they lay."""
    config = json.loads(to_json(base.config))
    folder = str(absolute(base.folder))
    pinned = {"step": base.latest_step(), "run": base.identity()}
    for part, entry in config["frozen"].items():
        if entry["source"] in (OWN, str(base.folder)):
            entry |= {"source": folder, "part": part, **pinned}
    start = {part: {"source": folder, "part": part, **pinned} for part in config["models"]}
    for part in paths.keys() & config["frozen"].keys():  # no longer as it was
        entry = config["frozen"].pop(part)
        config["models"][part] = model_of(ConfigDict(entry))
        start[part] = {key: entry[key] for key in ("source", "part", "step", "run") if key in entry}
    kernels = {
        f"{part}/{path}"
        for part, entry in config["models"].items()
        for path in kernels_of(create_model(**model_of(ConfigDict(entry))))
    }
    chosen = {
        f"{part}/{path.removesuffix('/down')}/kernel"
        for part, of in paths.items()
        for path in of
        if path.endswith("down")
    }
    return {
        **config,
        "initialize": start,
        "trainable": list(get_defaults().trainable),
        "lora": {"rank": rank, "alpha": float(scale * rank), "paths": list(_patterns(chosen, kernels))},
    }


def _patterns(chosen: set[str], kernels: set[str]) -> tuple[str, ...]:
    """Patterns that match these kernels and no others, the fewest of three ways to say it."""
    ends = sorted({"/".join(path.split("/")[-3:]) for path in chosen})
    for patterns in (get_defaults().lora.paths, tuple(f"/{end}$" for end in ends)):
        if {path for path in kernels if any(re.search(pattern, path) for pattern in patterns)} == chosen:
            return tuple(patterns)
    return tuple(f"^{path}$" for path in sorted(chosen))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def as_tensors(modules: Mapping[str, Mapping[str, np.ndarray]], prefix: str) -> Tensors:
    """Tensors of modules by the names that peft gives them."""
    return {
        f"{prefix}{name}.lora_{side}.weight": array for name, sides in modules.items() for side, array in sides.items()
    }
