"""Writing a run folder whose training happened elsewhere: converted weights, ready to be used or fine-tuned."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from cli.errors import UserError
from cli.locations import local, write_whole
from data.tokenizer import Tokenizer
from weights.files.tensors import write_tensors
from weights.run import CONFIG, PROVENANCE, TOKENIZER, WEIGHTS, tensor_name

Tree = Any


def write_pretrained(
    folder: str | Path,
    config: Mapping[str, Any],
    params: Mapping[str, Tree],
    variables: Mapping[str, Tree],
    *,
    provenance: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a folder that `weights.run.Run` opens; its config comes last, so that a folder with one is whole.

    Args:
      folder: a new or empty one.
      config: as a run's: objective, models, and what else the weights need (frozen, process, sample, sizes in data).
      params: {part: tree} of its networks, and of frozen ones whose source is `weights.run.OWN`; leaves are arrays, or
        `weights.files.tensors.Deferred`, which are made one by one.
      variables: {part: {collection: tree}}; may be empty.
      provenance: where the weights are from; a hash of them is added.
      tokenizer: of its captions.

    Raises:
      UserError: if the folder has something in it or cannot be written.
    """
    folder = new_folder(folder)
    tensors = {}
    for part, tree in params.items():
        for collection, leaves in {"params": tree, **variables.get(part, {})}.items():
            for path, leaf in flatten_dict(leaves).items():
                tensors[tensor_name(part, collection, "/".join(path))] = leaf
    write_tensors(folder / WEIGHTS, tensors)
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    write_json(folder / PROVENANCE, {**provenance, "sha256": digest})
    write_json(folder / CONFIG, config)


def free_folder(folder: str | Path) -> Path:
    """A folder for results as a path, without making it: what is read first may be refused.

    Raises:
      UserError: if it has something in it or cannot be one.
    """
    folder = local(folder, "--output")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; choose another --output or empty it")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --output") from error
    return folder


def new_folder(folder: str | Path) -> Path:
    """Makes a folder for results.

    Raises:
      UserError: if it has something in it or cannot be made.
    """
    folder = free_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --output") from error
    return folder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")
