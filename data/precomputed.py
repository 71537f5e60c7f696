"""Fields of examples that a frozen network made once, stored beside their dataset: read here as rows of .npy files.

    <dataset>/<version>/precomputed/image_tokens/3f9c0a51b2d4-32px/
        provenance.json                    the network, its weights' hash, dataset, sizes of pictures and drafts, code
        train-dalle_training.npy           [records, views, ...]: one split under one transform, records as stored
        train-dalle_training.json          which records could not be read
        validation-center_square.npy
    <dataset>/<version>/precomputed/text_features/81d20b7c9a4e-77tokens-5b1f0c2d/
        provenance.json                    likewise, with the tokenizer's hash
        train-captions.npy                 [captions, ...]: of a split, all of a record's one after another
        train-captions-starts.npy          [records + 1]: the number of each record's first one
        train-captions.json

A transform that draws nothing has one view of a picture. Of one that draws, `views` are stored; epoch e of a run sees
view e modulo their number, whatever the run's seed. Rows all have one size, so that any of them is found by its number
alone, and an interrupted file can be appended to.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Int, Shaped
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import Location, local_copy
from cli.plurals import spell_count
from data.preprocess import transform_pair
from data.records import dataset_folder
from data.tokenizer import Tokenizer

FOLDER = "precomputed"
PROVENANCE = "provenance.json"
AUTO = "auto"  # in `config.data.<field>`: the folder beside the dataset that the frozen weights name

# What a field is made of. An example has it in place of its picture, or beside the ids of its caption.
MADE_OF: Mapping[str, str] = {
    **dict.fromkeys(("image_tokens", "latent_moments", "image_features"), "image"),
    **dict.fromkeys(("text_features", "token_features", "caption_latents"), "text"),
}

CAPTIONS_STEM = "captions"  # in the place of a transform

_AGAIN = "run `python -m scripts.precompute` with this config"


def file_stem(split: str, transform: str) -> str:
    """The name of a split under a transform, without its suffix."""
    return f"{quote(split, safe='')}-{transform}"


def starts_of(path: Location) -> Location:
    """The file of the first captions' numbers beside a file of captions."""
    return path.with_name(f"{path.stem}-starts.npy")


def read_provenance(folder: Location) -> dict[str, Any] | None:
    """What a folder says of how it was made; None if there is none.

    Raises:
      UserError: if it is damaged.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove {folder} and run scripts.precompute again") from error


def made_of(name: str, config: ConfigDict, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Which pictures or captions `config.data` names: what a stored field must have in common with it.

    Args:
      name: of the field.
      config: `config.data`.
      tokenizer: of the captions.

    Raises:
      UserError: if there are no captions, or another text is made of them each time.
    """
    version = dataset_folder(config.dataset, config.data_dir).name
    if MADE_OF[name] == "image":
        return {"dataset": f"{config.dataset}/{version}", **_pictures_of(config)}
    if tokenizer is None:
        raise UserError(f"config.data.{name} is made of captions, and config.data.text_length is 0")
    for key, off in (("bpe_dropout", 0), ("dialogues", "")):
        if config.get(key, off):
            raise UserError(
                f"config.data.{key}={config[key]!r} makes another text of a caption each time, and config.data.{name} "
                f"is stored of captions as they are; set it to {off!r}"
            )
    return {
        "dataset": f"{config.dataset}/{version}",
        "text_field": config.text_field,
        "text_length": config.text_length,
        "tokenizer": tokenizer.digest,
    }


def _pictures_of(config: ConfigDict) -> dict[str, Any]:
    """The pictures, transform apart.

    `draft` is the short side, in pixels, near which a large JPEG is decoded, on which its pixels depend; 0 where all of
    it is read. A transform that needs more of a picture asks for more, also where it shares its evaluation.
    """
    return {
        "image_size": config.image_size,
        "image_field": config.image_field,
        "draft": transform_pair(config.transform).draft_side(config.image_size) if config.draft else 0,
    }


def field_folder(name: str, config: ConfigDict, tokenizer: Tokenizer | None, weights: str) -> Location:
    """Where a field of `config.data` is stored that a network with this hash makes. Raises as `made_of`."""
    made = made_of(name, config, tokenizer)
    if MADE_OF[name] == "image":
        size = f"{made['image_size']}px" + (f"-draft{made['draft']}" if made["draft"] else "")
        field = made["image_field"]
    else:
        size, field = f"{made['text_length']}tokens-{made['tokenizer'][:8]}", made["text_field"]
    named = f"-{quote(field, safe='')}" if field else ""
    return dataset_folder(config.dataset, config.data_dir) / FOLDER / name / f"{weights[:12]}-{size}{named}"


def check_made_of(folder: Location, made: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Compares what a folder says of how it was made with what `made_of` says.

    Raises:
      UserError: if they are others; `remedy` says what to do.
    """
    for what, value in wanted.items():
        if made.get(what) != value:
            raise UserError(f"{folder} is of {what} {made.get(what)}, not {value}; {remedy}")


@dataclasses.dataclass(frozen=True)
class StoredField:
    """One field of a split, for each record and view, or for each record's captions.

    Attributes:
      rows: [records, views, ...] or [captions, ...], read as they are asked for; of a store, from a copy on this
        machine.
      damaged: records whose pictures or captions could not be read, in whose place others stand.
      starts: number of each record's first caption; None of a field of pictures.
    """

    rows: Shaped[np.ndarray, "n *shape"]
    damaged: frozenset[int]
    starts: Int[np.ndarray, " records"] | None = None

    @classmethod
    def open(
        cls,
        name: str,
        folder: Location,
        config: ConfigDict,
        tokenizer: Tokenizer | None,
        *,
        split: str,
        transform: str,
        records: int,
    ) -> "StoredField":
        """Opens a split under a transform.

        Args:
          name: of the field.
          folder: with a `provenance.json`.
          config: `config.data`, of which it must be.
          tokenizer: likewise.
          split: of the dataset.
          transform: the name of the function; a field of captions has none.
          records: of the split.

        Raises:
          UserError: if it was not stored, or not completely, or of something else.
        """
        made, captions = read_provenance(folder), MADE_OF[name] == "text"
        if made is None:
            raise UserError(f"nothing precomputed is in {folder}; {_AGAIN}")
        check_made_of(folder, made, made_of(name, config, tokenizer), _AGAIN)
        path = folder / f"{file_stem(split, CAPTIONS_STEM if captions else transform)}.npy"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in folder.glob("*.npy"))) or "nothing"
            state = "is not complete" if any(folder.glob(f"{path.name}.part*")) else "is missing"
            raise UserError(f"{path} {state} (there is {there}); {_AGAIN}: it goes on where it was")
        try:
            rows = np.load(local_copy(path), mmap_mode="r")
            starts = np.load(local_copy(starts_of(path))) if captions else None
            damaged = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["damaged"]
            if starts is not None and starts[-1] != len(rows):
                raise ValueError(f"{spell_count(len(rows), 'caption')}, not {starts[-1]}")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, and {_AGAIN}") from error
        count = len(rows) if starts is None else len(starts) - 1
        if count != records:
            has = spell_count(count, "record")
            raise UserError(f"{path} has {has}, but the split has {records}; remove it, and {_AGAIN}")
        return cls(rows, frozenset(damaged), starts)

    @property
    def views(self) -> int:
        """How many of a picture are stored."""
        return self.rows.shape[1]

    def row(self, place: int, epoch: int, caption: int) -> Shaped[np.ndarray, "*shape"]:
        """The field of a record in some epoch, with that one of its captions; integers as int32."""
        at = (place, epoch % self.views) if self.starts is None else self.starts[place] + caption
        row = self.rows[at]
        return row.astype(np.int32) if np.issubdtype(row.dtype, np.integer) else np.array(row)
