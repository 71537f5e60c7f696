"""The modules of a network as a tree: parameters, FLOPs of a forward call, equal siblings folded."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from cost.architecture.roles import role_of
from cost.architecture.traced import TracedNetwork, path_of
from cost.flops import scoped_matrix_flops


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of a network, or a parameter that a module with others in it has of its own.

    Attributes:
      path: names from the network to it, "" for the network itself.
      name: what its parent calls it; of folded siblings the first.
      parameters: number of them, of those within it too.
      flops: multiplications and additions of its matrix products in a forward call.
      children: modules within it, in the order in which they are first called; then those that are not.
      shapes: paths and shapes of its parameters.
      role: what it is for, in the words of the papers; "" where its name says it.
      copies: names of the siblings that this one stands for, itself included.
    """

    path: str
    name: str
    parameters: int
    flops: int
    children: tuple["Module", ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    role: str = ""
    copies: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many modules it stands for."""
        return max(1, len(self.copies))

    @property
    def title(self) -> str:
        """Such as "mid_block", or "64 x blocks_0 ... blocks_63"."""
        if self.count == 1:
            return self.name
        if self.count == 2:
            return f"2 x {self.copies[0]}, {self.copies[1]}"
        return f"{self.count} x {self.copies[0]} ... {self.copies[-1]}"

    def walk(self, depth: int) -> Iterator[tuple[int, "Module"]]:
        """(level from 1, module) of those within it, `depth` levels down."""
        for child in self.children if depth > 0 else ():
            yield 1, child
            for level, module in child.walk(depth - 1):
                yield level + 1, module


def read_network(traced: TracedNetwork, params: Any = None) -> Module:
    """The tree of a network.

    FLOPs are those of the call that was traced: of one example, encoder and decoder of a first stage both; guidance and
    other calls of the same step not.

    Args:
      traced: the network.
      params: its parameters, or their shapes; None for what it starts with.
    """
    counts: dict[str, int] = {}
    for scope, count in scoped_matrix_flops(traced.program).items():
        path = path_of(scope)
        for end in range(len(path) + 1):
            own = "/".join(path[:end])
            counts[own] = counts.get(own, 0) + count
    tree = traced.params if params is None else params
    return _module(traced.name, tree, (), counts, {path: place for place, path in enumerate(counts)})


def read_tree(name: str, params: Any) -> Module:
    """The tree of parameters that are of no network."""
    return _module(name, params, (), {}, {})


def _module(
    network: str, tree: Any, path: tuple[str, ...], counts: Mapping[str, int], order: Mapping[str, int]
) -> Module:
    own = "/".join(path)
    children: list[Module] = []
    if isinstance(tree, Mapping) and (not path or any(isinstance(child, Mapping) for child in tree.values())):

        def rank(name: str) -> Any:
            place = order.get("/".join((*path, name)), len(order))
            return isinstance(tree[name], Mapping) is False, place, natural(name)

        children = [_module(network, tree[name], (*path, name), counts, order) for name in sorted(tree, key=rank)]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = tuple((jax.tree_util.keystr(at), tuple(leaf.shape)) for at, leaf in leaves)
    return Module(
        path=own,
        name=path[-1] if path else network,
        parameters=sum(math.prod(shape) for _, shape in shapes),
        flops=counts.get(own, 0),
        children=tuple(children),
        shapes=shapes,
        role=role_of(network, own, tuple(child.name for child in children)),
    )


def natural(name: str) -> tuple[Any, ...]:
    """A key that sorts numbers in names as numbers: 2 before 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part)


def fold(module: Module) -> Module:
    """The same with siblings put together that differ in the last number of their names alone.

    Such are equal in parameters and their shapes, in FLOPs and in all modules within.
    """
    groups: dict[Any, list[Module]] = {}
    for child in module.children:
        stem = re.fullmatch(r"(.*?)(\d+)(\D*)", child.name)
        key = (stem and (stem[1], stem[3]) or child.name, child.shapes, child.flops, child.role)
        groups.setdefault(key, []).append(child)
    children = [
        dataclasses.replace(
            fold(same[0]), copies=tuple(sorted((one.name for one in same), key=natural)) if len(same) > 1 else ()
        )
        for same in groups.values()
    ]
    return dataclasses.replace(module, children=tuple(children))
