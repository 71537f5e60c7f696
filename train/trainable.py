"""Which parameters of the networks are trained: `config.trainable`, a list of path patterns; all others are held.

The step differentiates with respect to the trained ones alone, so that the backward pass ends where they begin; the
optimizer and the moving average know no others. `params` stays whole, in the state as in its checkpoints.
"""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cli.errors import UserError
from train.distributed.sharding import check_pattern
from weights.sources import RANDOM

Tree = Any


def trained_params(params: Tree, patterns: Iterable[Any]) -> Tree:
    """Returns the tree of those parameters in whose path a pattern is found, without the modules that then are empty.

    Args:
      params: {part: tree}, or its shapes.
      patterns: regular expressions, `config.trainable`; a path is `dvae/decoder/input/kernel`.

    Raises:
      UserError: if there is no pattern, or one is no regular expression or is found in no path; names paths like it.
    """
    flat = flatten_dict(params, sep="/")
    kept: set[str] = set()
    for pattern in patterns:
        check_pattern("config.trainable", pattern)
        found = {path for path in flat if re.search(pattern, path)}
        if not found:
            raise UserError(f"config.trainable: {pattern!r} matches no parameter; {_paths_like(pattern, flat)}")
        kept |= found
    if not kept:
        raise UserError("config.trainable is empty: nothing would be trained; ('.*',) trains everything")
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path in kept}, sep="/")


def describe_held(config: ConfigDict, params: Tree) -> list[str]:
    """Lines for the log of a run that trains a part of its parameters; none where it trains all.

    Args:
      config: of the run.
      params: {part: tree}, or its shapes.
    """
    trained = trained_params(params, config.trainable)
    count, total = count_parameters(trained), count_parameters(params)
    if count == total:
        return []
    lines = [f"training {count:,} of {total:,} parameters (config.trainable); the others stay as they are"]
    for part, tree in params.items():
        held = count_parameters(tree) - count_parameters(trained.get(part, {}))
        entries = config.initialize.items()
        sources = {entry.source for name, entry in entries if str(entry.get("at", name)).split("/")[0] == part}
        if held and sources <= {"", RANDOM}:
            lines.append(f"warning: config.initialize.{part} names no source, so what is held of {part} is random")
    return lines


def count_parameters(tree: Tree) -> int:
    """Parameters of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _paths_like(pattern: str, paths: Iterable[str]) -> str:
    """Says which modules or parameters have names like a pattern, or which there are."""
    names: dict[str, str] = {}  # every run of names within a path -> the shortest path that ends with it
    modules: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")
        modules["/".join(parts[:2])] = None
        for end in range(1, len(parts) + 1):
            for start in range(end):
                names.setdefault("/".join(parts[start:end]), "/".join(parts[:end]))
    words = re.sub(r"\\.|[^\w/]", "", pattern).strip("/")
    close = [names[name] for name in difflib.get_close_matches(words, names, n=3)]
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(close))}?"
    shown = list(modules)[:6]
    return f"paths begin with {', '.join(shown)}{', ...' if len(modules) > len(shown) else ''}"
