"""Configs on the command line: `--config=file.py:argument` and `--config.a.b=value`."""

import ast
import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cli.errors import UserError


def load_config(arguments: Sequence[str]) -> ConfigDict:
    """Reads the config that the arguments name and applies their overrides.

    Args:
      arguments: one `--config=FILE[:ARGUMENT]` and any number of `--config.KEY[.KEY...]=VALUE`, in any order.
        `--config FILE` and `--config.KEY VALUE` are understood too.

    Returns:
      The locked config.

    Raises:
      UserError: missing file, a file without `get_config`, an unknown key, or a value of the wrong type.
    """
    pairs = _split(arguments)
    files = [value for name, value in pairs if name == "--config"]
    if len(files) != 1:
        raise UserError("give one config, for example --config=configs/scenes/dvae.py")
    config = _read(files[0])
    for name, value in pairs:
        if name != "--config":
            _override(config, name.removeprefix("--config."), value)
    config.lock()
    return config


def config_file(arguments: Sequence[str]) -> str:
    """What `load_config` reads of its arguments, FILE[:ARGUMENT]."""
    return next(value for name, value in _split(arguments) if name == "--config")


def from_json(text: str) -> ConfigDict:
    """Reads a config that `to_json` wrote."""
    return ConfigDict(_tuples(json.loads(text)))


def to_json(config: ConfigDict) -> str:
    """Writes a config with references resolved; `from_json` reads it back."""
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value}, tuples as lists, so that two configs can be compared key by key; empty groups vanish."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value, default=str))
    return flat


def _split(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Splits ["--a=b", "--c", "d"] into [("--a", "b"), ("--c", "d")]."""
    pairs = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name != "--config" and not name.startswith("--config."):
            raise UserError(f"unknown argument {name}; see --help")
        if not equals:
            if not rest:
                raise UserError(f"{name} needs a value, as in {name}=VALUE")
            value = rest.pop(0)
        pairs.append((name, value))
    return pairs


def _read(name: str) -> ConfigDict:
    """Calls `get_config(argument)` of `file.py:argument`."""
    filename, _, argument = name.partition(":")
    path = Path(filename)
    if not path.is_file():
        raise UserError(f"there is no config file {filename}; run from the repository root or give its path")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{filename} is not a Python file; a config is a .py file with get_config(argument)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{filename}, line {error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"{filename} has no get_config(argument), so it is not a config")
    try:
        return module.get_config(argument)
    except ValueError as error:  # how a config refuses an argument it does not know
        raise UserError(f"{name}: {error}") from error


def _override(config: ConfigDict, dotted: str, text: str) -> None:
    """Sets one key from text, keeping the type that the config gave it."""
    *parents, key = dotted.split(".")
    node: Any = config
    for depth, parent in enumerate([*parents, key]):
        if not isinstance(node, ConfigDict) or parent not in node:
            known = list(node.keys()) if isinstance(node, ConfigDict) else []
            where = ".".join(["config", *dotted.split(".")[:depth]])
            close = difflib.get_close_matches(parent, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"{where} has {', '.join(known) or 'no keys'}"
            raise UserError(f"unknown config key config.{dotted}: {hint}")
        if depth < len(parents):
            node = node[parent]
    if isinstance(node[key], ConfigDict):
        raise UserError(f"config.{dotted} is a group of keys; set one of {', '.join(node[key].keys())}")
    node[key] = _parse(f"config.{dotted}", text, node.get_type(key))


def _parse(name: str, text: str, kind: type) -> Any:
    """Reads `text` as a value of type `kind`."""
    if kind is str:
        return text
    try:
        value = {"true": True, "false": False}.get(text.lower())
        if value is None:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    # A bool is an int to Python, but `steps=True` is a mistake.
    if type(value) is not kind and not (kind is object or kind is type(None)):
        raise UserError(f"{name}={text} has the wrong type: it must be {_NAMES.get(kind, kind.__name__)}")
    return value


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", tuple: 'a tuple such as "(1, 2)"'}


def _tuples(value: Any) -> Any:
    """Turns the lists that JSON knows back into the tuples that configs use."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
