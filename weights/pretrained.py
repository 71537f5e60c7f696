"""Writing a run folder whose training happened elsewhere: converted weights, ready to be used or fine-tuned."""

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from cli.compilation_cache import cache_home
from cli.errors import UserError
from cli.locations import Location, in_store, locate, upload, write_whole
from data.tokenizer import Tokenizer
from weights.files.tensors import write_tensors
from weights.run import CONFIG, PROVENANCE, TOKENIZER, WEIGHTS, WRITES_WITH, tensor_name

Tree = Any


def write_pretrained(
    folder: str | Location,
    config: Mapping[str, Any],
    params: Mapping[str, Tree],
    variables: Mapping[str, Tree],
    *,
    provenance: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    caption_tokenizer: Tokenizer | None = None,
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
      caption_tokenizer: that captions are written with, where that is another one.

    Raises:
      UserError: if the folder has something in it or cannot be written.
    """
    tensors = {}
    for part, tree in params.items():
        for collection, leaves in {"params": tree, **variables.get(part, {})}.items():
            for path, leaf in flatten_dict(leaves).items():
                tensors[tensor_name(part, collection, "/".join(path))] = leaf
    with filled_folder(folder, CONFIG) as new:
        write_tensors(new / WEIGHTS, tensors)
        with (new / WEIGHTS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if tokenizer is not None:
            tokenizer.save(new / TOKENIZER)
        if caption_tokenizer is not None:
            caption_tokenizer.save(new / WRITES_WITH)
        write_json(new / PROVENANCE, {**provenance, "sha256": digest})
        write_json(new / CONFIG, config)


def free_folder(folder: str | Location) -> Location:
    """A folder for results as a path, without making it: what is read first may be refused.

    Raises:
      UserError: if it has something in it or cannot be one.
    """
    folder = locate(folder)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; choose another --output or empty it")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --output") from error
    return folder


@contextlib.contextmanager
def filled_folder(folder: str | Location, marker: str = "") -> Iterator[Path]:
    """Makes a folder for results, which the block fills; in a store they are there when it has ended.

    Args:
      folder: a new or empty one.
      marker: of its files the one that is put into a store last.

    Yields:
      where to write them: on this machine in any case.

    Raises:
      UserError: if it has something in it or cannot be made.
    """
    location = free_folder(folder)
    draft = cache_home() / "tessera" / "outputs" / uuid.uuid4().hex if in_store(location) else location
    try:
        draft.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {draft}: {error.strerror}; choose another --output") from error
    if draft == location:
        yield draft
        return
    try:
        yield draft
        upload(draft, location, marker)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")
