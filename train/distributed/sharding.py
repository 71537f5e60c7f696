"""Which device holds which part of a parameter: ordered path-regex rules."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cli.errors import UserError

Tree = Any


def path_name(path: tuple[Any, ...]) -> str:
    """Names a leaf: `dalle/block_0/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Tree, rules: tuple[tuple[str, tuple[str | None, ...]], ...], mesh: Mesh) -> Tree:
    """Gives every leaf the sharding of the first rule whose pattern is found in its path.

    Args:
      tree: arrays or ShapeDtypeStructs.
      rules: (pattern, axes) in order; axes name mesh axes for the leading dimensions, None for a whole one.
      mesh: the devices.

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
