"""What a foreign format declares of itself; `scripts.convert`, its help and its errors are made of that."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import write_whole
from data.tokenizer import Tokenizer
from weights.files.origin import Origin
from weights.files.tensors import write_tensors
from weights.pretrained import write_json

Tree = Any

# What is written, by the files' names: tensors in .safetensors, text where it is a string, JSON objects in all others.
Files = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """One network with weights.

    Attributes:
      model: the Linen module.
      params: its parameters.
      variables: {collection: tree}; may be empty.
      null_class: whether the last class that it knows, if any, stands for none.
      beside: networks that it is used with, frozen parts by their names; {} where it is written alone.
      config: of its run, which says how it is used with those; None where it is written alone.
      tokenizer: of its run's texts; None if there is none.
    """

    model: Any
    params: Tree
    variables: Tree
    null_class: bool = True
    beside: Mapping[str, "Network"] = dataclasses.field(default_factory=dict)
    config: ConfigDict | None = None
    tokenizer: Tokenizer | None = None


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A run with all that it draws with.

    Attributes:
      config: of the run.
      networks: {part: network}, trained and frozen ones.
      tokenizer: of its captions; None if there is none.
    """

    config: ConfigDict
    networks: Mapping[str, Network]
    tokenizer: Tokenizer | None


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """The low-rank pairs of a run, see `weights.lora`.

    Attributes:
      models: {part: network} of those that have pairs.
      pairs: {part: tree}.
      rank: of the pairs.
      scale: alpha / rank.
    """

    models: Mapping[str, Any]
    pairs: Mapping[str, Tree]
    rank: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was read, as a run folder has it; see `weights.run`.

    Attributes:
      config: keys of a run's config.json.
      params: {part: tree}.
      variables: {part: {collection: tree}}; may be empty.
      tokenizer: of captions; None if there is none.
      caption_tokenizer: that captions are written with, where that is another one.
      notes: lines that a user should read.
    """

    config: dict[str, Any]
    params: dict[str, Tree]
    variables: dict[str, Tree] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    caption_tokenizer: Tokenizer | None = dataclasses.field(default=None, kw_only=True)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of another project.

    Attributes:
      name: of the project, as `--source` and `--to` take it.
      networks: which of `models.MODELS` it holds.
      inputs: what INPUT may be beside a folder, a file or a repository of any of them, for the help; a sentence part.
      outputs: what the other project does with what is written, for the help.
      recognizes: whether files look like this format's; never raises for a file that is something else.
      read: (origin, **options) -> what it holds; raises UserError where that is none of it, or ours cannot compute it.
      write: one network -> files; raises UserError where the other project cannot compute it. None: nothing is written.
      options: {flag: help} of what reading may be told.
      beside: network -> the frozen parts that are written with it where a run has them and no part is asked for.
      write_pipeline: a run with all that it draws with -> files; None where there is no such thing.
      write_pairs: low-rank pairs -> files, of a format that holds these alone; None of others.
    """

    name: str
    networks: tuple[str, ...]
    inputs: str
    outputs: str
    recognizes: Callable[[Origin], bool]
    read: Callable[..., Converted]
    write: Callable[[Network], Files] | None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    write_pipeline: Callable[[Pipeline], Files] | None = None
    write_pairs: Callable[[Adaptation], Files] | None = None


def refuse_unread(what: str, **options: str) -> None:
    """Refuses options that say nothing of what is read.

    Args:
      what: is read.
      options: that play no part in it, by their names, as given; "" for those that are not.

    Raises:
      UserError: if any is given.
    """
    if given := [f"--{name}" for name, value in options.items() if value]:
        raise UserError(f"{', '.join(given)} says nothing of {what}; leave it out")


def write_files(folder: Path, files: Files) -> None:
    """Writes what a format made.

    Raises:
      UserError: if a file cannot be written.
    """
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            write_tensors(path, value)
        elif isinstance(value, str):
            write_whole(path, value)
        else:
            write_json(path, value)
