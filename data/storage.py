"""Where datasets are kept and made, and how those that are drawn on this machine are written to disk, once."""

import contextlib
import dataclasses
import errno
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tensorflow_datasets as tfds

from cli.compilation_cache import cache_home
from cli.errors import UserError
from cli.locations import Location, in_store, local, locate_from_home, upload

INFO = "dataset_info.json"  # of TFDS: a folder that holds it is a dataset, and a whole one


def find_versions(folder: Location) -> list[Location]:
    """The versions of a dataset that a folder holds, whole ones; what else lies there, such as a backup, is none."""
    return [path.parent for path in folder.glob(f"*/{INFO}") if re.fullmatch(r"\d+(\.\d+)*", path.parent.name)]


@dataclasses.dataclass(frozen=True)
class DataHome:
    """A folder of datasets. In a store none can be made, since records are written as files: it is made beside, whole.

    Attributes:
      kept: where datasets are read from.
      made: where they are made, on this machine; the same folder unless `kept` is in a store.
    """

    kept: Location
    made: Path

    @classmethod
    def open(cls, data_dir: str) -> "DataHome":
        """The home that a user names.

        Raises:
          UserError: see `cli.locations.locate_from_home`.
        """
        kept = locate_from_home(data_dir)
        if not in_store(kept):
            return cls(kept, kept)
        return cls(kept, cache_home() / "tessera" / "prepared" / quote(str(kept), safe=""))

    def published(self, dataset: str) -> bool:
        """Whether a dataset is in a store already."""
        return in_store(self.kept) and bool(find_versions(self.kept / dataset))

    def place(self, folder: Location) -> Location:
        """Where a folder that was made, or is kept, is kept."""
        return self.kept / folder.relative_to(self.made) if folder.is_relative_to(self.made) else folder

    def publish(self, folder: Location) -> None:
        """Moves a dataset that was made to where it is kept, `INFO` last: until then it is not there."""
        if self.place(folder) != folder:
            upload(folder, self.place(folder), INFO)
            shutil.rmtree(folder)


def prepare(make_builder: Any, config_name: str, data_dir: str | os.PathLike[str], **sizes: int) -> Any:
    """Prepares a config of a builder under `data_dir`, or returns at once where it already is.

    The folder gets its name only when all of it is written; whatever else bears that name (an interrupted copy, a
    record file that is missing) does not count and is written anew.

    Args:
      make_builder: a class of TFDS builders, with `SPLITS`, and `sizes` among the arguments of its constructor.
      config_name: one of its configs.
      data_dir: where TFDS keeps datasets.
      **sizes: number of examples of some splits in place of the config's own.

    Returns:
      The builder; `builder.as_data_source(split)` reads it.

    Raises:
      UserError: if there is no such config or split, or if the dataset is there with another number of examples than
        `sizes` asks for.
    """
    name, configs, splits = make_builder.name, make_builder.builder_configs, make_builder.SPLITS
    if config_name not in configs:
        raise UserError(f"{name} has no config {config_name!r}; choose one of {', '.join(configs)}")
    unknown = sorted(set(sizes) - set(splits))
    if unknown:
        raise UserError(f"{name} has no split {', '.join(unknown)}; it has {', '.join(splits)}")
    data_dir = local(locate_from_home(data_dir), "data_dir")
    builder = make_builder(config=config_name, data_dir=data_dir, file_format="array_record", sizes=sizes)
    folder = Path(builder.data_dir)
    if folder.exists() and not _is_whole(builder):
        shutil.rmtree(folder)
        builder = make_builder(config=config_name, data_dir=data_dir, file_format="array_record", sizes=sizes)
    if not folder.exists():
        tfds.disable_progress_bar()
        try:
            with disk_errors(), contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download; there is none
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        except OSError:  # another process may have been first to give the folder its name
            builder = make_builder(config=config_name, data_dir=data_dir, file_format="array_record", sizes=sizes)
            if not _is_whole(builder):
                raise
    stored = {split: builder.info.splits[split].num_examples for split in sizes}
    if stored != sizes:
        raise UserError(f"{folder} holds {stored} examples, not {sizes}; remove it or choose another data_dir")
    return builder


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Has ArrayRecord's errors of a disk that is full or cannot be written, `RuntimeError`s, raised as `OSError`."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("failed: .*; (writing|opening) ", str(error), re.DOTALL):
            raise
        raise OSError(errno.EIO, " ".join(str(error).split())[:300]) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft that gets its name when the block has ended well."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    yield draft
    draft.replace(path)


def _is_whole(builder: Any) -> bool:
    """Whether every split is described and every record file is there."""
    splits = builder.info.splits
    if not builder.is_prepared() or set(splits) != set(builder.SPLITS):
        return False
    return all(Path(path).exists() for split in splits.values() for path in split.filepaths)
