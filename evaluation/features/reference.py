"""Features of a dataset's pictures, kept on disk with what they were computed from.

Features of 30,000 pictures take hours on a CPU and are the same for every run on the dataset. A file holds the features
and their provenance, everything that decides their values; the file's name is a hash of the provenance. So features of
another split, number, resize or extractor are never read in its place: they are other files.
"""

import dataclasses
import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cli.compilation_cache import cache_home
from cli.errors import UserError
from data.records import dataset_folder

FORMAT = 2  # of the files, and of what happens to a picture before the extractor; a change makes all of them recomputed

Provenance = Mapping[str, str | int]


def default_folder() -> Path:
    """Where features are kept unless a user says otherwise: `${XDG_CACHE_HOME:-~/.cache}/tessera/features`."""
    return cache_home() / "tessera" / "features"


def dataset_provenance(
    dataset: str, data_dir: str | None, split: str, num: int, image_size: int, pictures: str = "center_square"
) -> dict[str, Any]:
    """What decides which pictures are measured: the first `num` of a split at `image_size`, as `pictures` cuts them.

    A dataset that was prepared with other contents under the same name and version is told apart by its
    dataset_info.json, which has the number of records and bytes of every file.

    Raises:
      UserError: if the dataset was not prepared.
    """
    folder = dataset_folder(dataset, data_dir)
    contents = hashlib.sha256((folder / "dataset_info.json").read_bytes()).hexdigest()[:16]
    return {
        "format": FORMAT,
        "dataset": f"{dataset}/{folder.name}",
        "contents": contents,
        "split": split,
        "num": num,
        "image_size": image_size,
        "pictures": pictures,
    }


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """A folder of features.

    Attributes:
      folder: made when it is first written to; None keeps nothing.
    """

    folder: Path | None

    def get(
        self, provenance: Provenance, compute: Callable[[], tuple[Float[np.ndarray, "n d"], bool]]
    ) -> Float[np.ndarray, "n d"]:
        """Reads features, or computes and keeps them.

        A file that is damaged is computed again and replaced. Files are written aside and renamed, so one that another
        process is writing, or that a crash cut short, does not exist under its name.

        Args:
          provenance: everything that the values depend on; `num` is the number of pictures.
          compute: gives the features, and whether they are worth keeping (not if records could not be read).

        Raises:
          UserError: if the file of this provenance holds that of other features, or cannot be written.
        """
        if self.folder is None:
            return compute()[0]
        path = self.path(provenance)
        if path.is_file():
            features = self._read(path, provenance)
            if features is not None:
                return features
            print(f"warning: {path} is damaged; its features are computed again", flush=True)
        features, keep = compute()
        if keep:
            self._write(path, provenance, features)
        return features

    def path(self, provenance: Provenance) -> Path:
        """The file of a provenance: readable names, and a hash that decides."""
        digest = hashlib.sha256(_spell(provenance).encode()).hexdigest()[:16]
        words = "-".join(str(provenance.get(key, "")) for key in ("dataset", "split", "num"))
        readable = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in words)
        return (self.folder or Path()) / f"{readable}-{digest}.npz"

    def _read(self, path: Path, provenance: Provenance) -> Float[np.ndarray, "n d"] | None:
        """The features, or None if the file is damaged."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                stored, features = str(archive["provenance"]), archive["features"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if stored != _spell(provenance):
            raise UserError(f"{path} holds other features than its name says ({stored}); delete it")
        whole = features.ndim == 2 and len(features) == provenance["num"] and np.isfinite(features).all()
        return features if whole else None

    def _write(self, path: Path, provenance: Provenance, features: Float[np.ndarray, "n d"]) -> None:
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with draft.open("wb") as file:
                    np.savez(file, features=features, provenance=np.array(_spell(provenance)))
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep features in {path.parent}: {error}; give --features_dir=FOLDER") from error


def _spell(provenance: Provenance) -> str:
    return json.dumps(provenance, sort_keys=True)
