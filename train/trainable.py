"""Which parameters of the networks are trained: `config.trainable`, a list of path patterns; all others are held.

The step differentiates with respect to the trained ones alone, so that the backward pass ends where they begin; the
optimizer and the moving average know no others. `params` stays whole, in the state as in its checkpoints, but for those
of low-rank pairs, `config.lora`.
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
from configs.common import get_defaults
from train.distributed.sharding import check_pattern
from weights.lora import LORA
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
    kept = matching_paths("config.trainable", patterns, flat, "parameter")
    if not kept:
        raise UserError("config.trainable is empty: nothing would be trained; ('.*',) trains everything")
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path in kept}, sep="/")


def matching_paths(key: str, patterns: Iterable[Any], paths: Iterable[str], kind: str) -> set[str]:
    """Returns those paths in which a pattern is found.

    Args:
      key: of the config, that the patterns are from.
      patterns: regular expressions.
      paths: to look in.
      kind: of what the paths are of, for the error.

    Raises:
      UserError: if a pattern is no regular expression or is found in no path; names paths like it.
    """
    paths, kept = list(paths), set()
    for pattern in patterns:
        check_pattern(key, pattern)
        found = {path for path in paths if re.search(pattern, path)}
        if not found:
            raise UserError(f"{key}: {pattern!r} matches no {kind}; {_paths_like(pattern, paths)}")
        kept |= found
    return kept


def trained_patterns(config: ConfigDict) -> tuple[Any, ...]:
    """The patterns of what a run trains: `config.trainable`.

    Of a run with `config.lora` they are its pairs, and beside them what `config.trainable` says if that is not the
    default, all parameters.
    """
    if not config.lora.rank:
        return tuple(config.trainable)
    chosen = tuple(config.trainable)
    return (f"^{LORA}/", *(chosen if chosen != tuple(get_defaults().trainable) else ()))


def describe_held(config: ConfigDict, params: Tree) -> list[str]:
    """Lines for the log of a run that trains a part of its parameters; none where it trains all.

    Args:
      config: of the run.
      params: {part: tree}, or its shapes.
    """
    trained = trained_params(params, trained_patterns(config))
    count, total = count_parameters(trained), count_parameters(params)
    if count == total:
        return []
    lines = [f"training {count:,} of {total:,} parameters ({held_by(config)}); the others stay as they are"]
    for part, tree in params.items():
        held = count_parameters(tree) - count_parameters(trained.get(part, {}))
        entries = config.initialize.items()
        sources = {entry.source for name, entry in entries if str(entry.get("at", name)).split("/")[0] == part}
        if held and sources <= {"", RANDOM}:
            lines.append(f"warning: config.initialize.{part} names no source, so what is held of {part} is random")
    return lines


def held_by(config: ConfigDict) -> str:
    """The key of a config that says which parameters are not trained."""
    return "config.lora" if config.lora.rank else "config.trainable"


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
