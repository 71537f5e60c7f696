"""Drawings of things with names, which nobody drew for this project: OpenMoji as a captioned dataset."""

import os
from pathlib import Path

from data import storage
from data.drawings.drawings_dataset_builder import Builder
from data.drawings.openmoji import license_text

NAMES = tuple(Builder.builder_configs)


def prepare(config_name: str, data_dir: str | os.PathLike[str], **sizes: int) -> Builder:
    """Prepares `drawings/<config_name>` as `data.storage.prepare` does, with the drawings' license beside it.

    Raises:
      UserError: as there, or if the packages that hold the drawings are not installed.
    """
    builder = storage.prepare(Builder, config_name, data_dir, **sizes)
    path = Path(builder.data_dir) / "LICENSE.txt"
    if not path.is_file():
        path.write_text(license_text(), encoding="utf-8")
    return builder
