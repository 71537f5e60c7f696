"""How data pass through a network: its modules in boxes, and which box reads what another one makes."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jax.extend.core import Literal

from cost.architecture.modules import Module, fold
from cost.architecture.traced import TracedNetwork, path_of

# Modules whose own modules have boxes.
_OPENED = ("encoder", "decoder", "image", "text", "language")
OUTPUT = "output of the network"


@dataclasses.dataclass(frozen=True)
class Box:
    """Modules of one place in a network: those of a level of a UNet, all layers of a stack.

    Attributes:
      name: such as "down 0", "blocks" or "encoder/mid".
      modules: in it, equal ones folded.
      size: shape of what its first module makes, without a batch: a level's resolution; () if that is not known.
      output: of what the last one makes.
    """

    name: str
    modules: tuple[Module, ...]
    size: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Of all modules in it."""
        return sum(module.parameters * module.count for module in self.modules)

    @property
    def flops(self) -> int:
        """Of all modules in it."""
        return sum(module.flops * module.count for module in self.modules)


@dataclasses.dataclass(frozen=True)
class Flow:
    """A network as a graph.

    Attributes:
      boxes: in the order in which they are entered, then those that the call does not enter.
      edges: (what makes, what reads), names of boxes, of inputs of the network, or `OUTPUT`.
      inputs: shape, without the batch, of each.
    """

    boxes: tuple[Box, ...]
    edges: tuple[tuple[str, str], ...]
    inputs: Mapping[str, tuple[int, ...]]

    def sources(self, box: str) -> list[str]:
        """What it reads, in the order of the edges."""
        return [made for made, read in self.edges if read == box]


def read_flow(traced: TracedNetwork, tree: Module) -> Flow:
    """The graph of a network, read from the operations of its program.

    What stands between boxes (sums, concatenations, changes of shape) passes on what it reads. An edge is there once,
    and none from a box to itself.

    Args:
      traced: the network.
      tree: its modules.
    """
    members: dict[str, list[Module]] = {}
    for module in tree.children:
        opened = module.name in _OPENED and module.children
        for one in module.children if opened else (module,):
            called = one.path in traced.outputs
            box = _box_of(tuple(one.path.split("/"))) if called else f"{module.name}/parameters" if opened else one.name
            members.setdefault(box, []).append(one)

    sources: dict[Any, tuple[str, ...]] = {}
    edges: dict[tuple[str, str], None] = {}
    given = traced.program.invars[len(traced.program.invars) - len(traced.inputs) :]
    for variable, (name, _) in zip(given, traced.inputs, strict=True):
        sources[variable] = (name,)

    def read(variables: Any) -> tuple[str, ...]:
        found = (sources.get(one, ()) for one in variables if not isinstance(one, Literal))
        return tuple(dict.fromkeys(name for names in found for name in names))

    for equation in traced.program.eqns:
        path = path_of(str(equation.source_info.name_stack))
        box, made = _box_of(path), read(equation.invars)
        if box in members:
            edges |= {(source, box): None for source in made if source != box}
            made = (box,)
        sources |= dict.fromkeys(equation.outvars, made)
    edges |= {(source, OUTPUT): None for source in read(traced.program.outvars)}

    def box_of(name: str, modules: list[Module]) -> Box:
        told = any(reader == name for _, reader in edges)  # of what no input leads to, no dimension is a batch
        shapes = [traced.outputs[one.path][told:] for one in modules if one.path in traced.outputs] or [()]
        folded = fold(dataclasses.replace(tree, children=tuple(modules))).children
        return Box(name, folded, shapes[0], shapes[-1])

    boxes = tuple(box_of(name, modules) for name, modules in members.items())
    return Flow(boxes, tuple(edges), dict(traced.inputs))


def _box_of(path: tuple[str, ...]) -> str:
    """The name of the box that a module stands in; "" for a network itself and what is opened."""
    if not path or path == ("",):
        return ""
    opened = path[0] in _OPENED
    if opened and len(path) == 1:
        return ""
    name = path[1] if opened else path[0]
    level = re.match(r"(down|up|stage|group)_(\d+)_\w", name)
    if level:
        name = f"{level[1]} {level[2]}"
    elif name.startswith("mid_"):
        name = "mid"
    elif name in ("output_norm", "final_norm") or re.fullmatch(r"output(_norm)?", name):
        name = name.removesuffix("_norm")
    else:
        name = re.sub(r"(_\d+)+$", "", name)
    return f"{path[0]}/{name}" if opened else name
