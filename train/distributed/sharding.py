"""Which device holds which part of a parameter: ordered path-regex rules, and patterns of paths in general."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from cli.errors import UserError

Tree = Any


def path_name(path: tuple[Any, ...]) -> str:
    """Names a leaf: `dalle/block_0/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_pattern(name: str, pattern: Any) -> None:
    """Raises UserError unless a pattern of paths is a regular expression."""
    try:
        if not isinstance(pattern, str):
            raise TypeError("it must be a string")
        re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{name}: {pattern!r} is not a pattern of paths ({error})") from error


def check_rules(rules: Sequence[Any]) -> None:
    """Raises UserError unless each of `config.mesh.rules` is a pattern of paths with names of axes."""
    for index, rule in enumerate(rules):
        name = f"config.mesh.rules[{index}]"
        pair = isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[1], tuple | list)
        if not pair or not all(axis is None or isinstance(axis, str) for axis in rule[1]):
            raise UserError(f"{name} is {rule!r}; it must be (pattern, (axis of each leading dimension or None, ...))")
        check_pattern(name, rule[0])


def shardings(tree: Tree, rules: tuple[tuple[str, tuple[str | None, ...]], ...], mesh: Mesh | AbstractMesh) -> Tree:
    """Gives every leaf the sharding of the first rule whose pattern is found in its path.

    Args:
      tree: arrays or ShapeDtypeStructs.
      rules: (pattern, axes) in order; axes name mesh axes for the leading dimensions, None for a whole one.
      mesh: the devices, or their number on each axis.

    Returns:
      A tree of NamedShardings.

    Raises:
      UserError: if a path matches no rule, or a dimension does not divide over its axis.
    """

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, axes in rules:
            if re.search(pattern, name):
                spec = axes[: len(leaf.shape)]
                for size, axis in zip(leaf.shape, spec, strict=False):
                    if axis is not None and axis not in mesh.shape:
                        raise UserError(f"rule {pattern!r} names an axis {axis!r}; a mesh has {', '.join(mesh.shape)}")
                    if axis is not None and size % mesh.shape[axis]:
                        raise UserError(
                            f"{name}: dimension {size} does not divide over {mesh.shape[axis]} devices of axis "
                            f"{axis!r}; change config.mesh or the rule {pattern!r}"
                        )
                return NamedSharding(mesh, PartitionSpec(*spec))
        raise UserError(f"no rule of config.mesh.rules matches {name}; add one, or end with ('.*', ())")

    return jax.tree_util.tree_map_with_path(choose, tree)
