"""What `--source` names: a folder, a table, archives, parquet files, or a repository of the Hugging Face hub."""

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from cli.errors import UserError
from cli.locations import Location, locate
from data.folder import tables
from data.folder.items import PICTURES, Item, Listing, Rejected, shown
from data.folder.parquet_files import is_parquet, list_parquet
from data.folder.picture_folder import list_folder, walk
from data.folder.tables import Fields
from data.folder.tar_archives import is_archive, list_archives, stem_of_archive
from data.hub import HUB, fetch_dataset

_MAX_NAMES = 100_000  # that braces may spell


def list_source(source: str, fields: Fields) -> Listing:
    """Looks through a source.

    Args:
      source: a folder; a table of captions beside pictures; tar archives or parquet files, also in a store, where
        `*`, `{a,b}` and `{000..010}` may stand for several; or hf:ORGANIZATION/NAME[@REVISION].
      fields: that were asked for.

    Raises:
      UserError: if it is not there, or there is no picture in it.
    """
    try:
        return _list_source(source, fields)
    except OSError as error:
        detail = error.strerror or error
        raise UserError(f"cannot read {source}: {detail}; give another --source, or check its rights") from error


def _list_source(source: str, fields: Fields) -> Listing:
    if source.startswith(HUB):
        folder, bounds = fetch_dataset(source)
        return _list_folder(folder, bounds, fields)
    if "://" in source:
        return _list_files(source, _expand_in_store(source), fields)
    path = _path(source)
    if path.is_dir():
        return _list_folder(path.resolve(), path.resolve(), fields)
    if path.is_file() and path.suffix.lower() in tables.SUFFIXES:
        root = path.parent.resolve()
        return list_folder(root, fields, walk(root, root), table=root / path.name)
    return _list_files(source, _expand(source), fields)


def _list_files(source: str, paths: Sequence[Location], fields: Fields) -> Listing:
    """Archives or parquet files, all of one kind."""
    names = _short_names(paths)
    if all(is_archive(path.name) for path in paths):
        return list_archives(list(zip(names, paths, strict=True)), fields)
    if all(is_parquet(path.name) for path in paths):
        return list_parquet(list(zip(names, paths, strict=True)), fields)
    raise UserError(
        f"{source} is no folder and no kind of file that is read: tables ({', '.join(tables.SUFFIXES)}), tar archives "
        f"(.tar, .tar.gz) or parquet files, all of one kind; give another --source"
    )


def _list_folder(root: Path, bounds: Path, fields: Fields) -> Listing:
    """A folder of pictures, or one of archives or parquet files where it has no picture of its own.

    Parquet files go before archives, unless one lies beside the archive that it describes, as img2dataset writes them.
    """
    files, ignored = walk(root, bounds)
    archives = {stem_of_archive(name) for name in files if is_archive(name)}
    described = any(is_parquet(name) and str(PurePosixPath(name).with_suffix("")) in archives for name in files)
    kinds: list[tuple[Callable[[str], bool], Callable[..., Listing]]] = [
        (is_parquet, list_parquet),
        (is_archive, list_archives),
    ]
    if described:
        kinds.reverse()
    if not any(Path(name).suffix.lower() in PICTURES for name in files):
        for is_kind, listing_of in kinds:
            if names := [name for name in files if is_kind(name)]:
                listing = listing_of([(name, root / name) for name in names], fields)
                others = [Item(shown(name), rejected=Rejected("other")) for name in files if not is_kind(name)]
                ignored = [*listing.ignored, *ignored, *others]
                return Listing(
                    listing.kind, listing.portions, listing.fingerprint, ignored, listing.notes, listing.class_names
                )
    return list_folder(root, fields, (files, ignored))


def _path(source: str) -> Path:
    """The path that is named; a home that nobody has, on which `Path.expanduser` fails, is left as it is written."""
    return Path(os.path.expanduser(source))


def _expand(source: str) -> list[Path]:
    """The files that a pattern names, sorted, each once.

    Raises:
      UserError: if one is not there.
    """
    path = _path(source)
    if path.is_file():
        return [path.resolve()]
    names = _names(source, str(path))
    found = [sorted(glob.glob(name)) if glob.has_magic(name) and not Path(name).exists() else [name] for name in names]
    missing = [
        name for name, paths in zip(names, found, strict=True) if not any(Path(path).is_file() for path in paths)
    ]
    if missing:
        others = f" (and {len(missing) - 1:,} more are missing)" if len(missing) > 1 else ""
        raise UserError(f"there is no file {missing[0]}{others}; give another --source: a folder, files or a pattern")
    return [Path(path).resolve() for path in dict.fromkeys(itertools.chain(*found)) if Path(path).is_file()]


def _names(source: str, pattern: str) -> list[str]:
    """What braces of a pattern spell."""
    names = list(itertools.islice(expand_braces(pattern), _MAX_NAMES + 1))
    if len(names) > _MAX_NAMES:
        raise UserError(f"{source} names more than {_MAX_NAMES:,} files; give a pattern with *")
    return names


def _expand_in_store(source: str) -> list[Location]:
    """As `_expand`, of files in a store.

    Raises:
      UserError: if one is not there, or it is a folder, whose pictures would be asked for one by one.
    """
    found: list[Location] = []
    for place in map(locate, _names(source, source)):
        files = sorted(place.parent.glob(place.name)) if glob.has_magic(place.name) else [place]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(
                f"there is no file {place}; of a store, tar archives and parquet files are read, as '{place}/*.tar'; "
                "copy pictures and tables here with `gcloud storage cp --recursive`"
            )
        found += files
    return list(dict.fromkeys(found))


def expand_braces(pattern: str) -> Iterator[str]:
    """Yields what a shell would make of `{a,b}` and of `{000..010}`, which keeps its zeros; `{10..1}` counts down."""
    match = re.search(r"\{(?:(\d{1,12})\.\.(\d{1,12})|([^{}]*,[^{}]*))\}", pattern, re.ASCII)
    if not match:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    if match[1]:
        first, last = int(match[1]), int(match[2])
        padded = any(len(number) > 1 and number.startswith("0") for number in match.groups()[:2])
        width = max(len(match[1]), len(match[2])) if padded else 0
        step = 1 if first <= last else -1
        parts: Iterator[str] = (f"{number:0{width}d}" for number in range(first, last + step, step))
    else:
        parts = iter(match[3].split(","))
    for part in parts:
        yield from expand_braces(f"{before}{part}{after}")


def _short_names(paths: Sequence[Location]) -> list[str]:
    """The last parts of names, or as much of them as tells them apart."""
    last = [shown(path.name) for path in paths]
    return last if len(set(last)) == len(last) else [shown(str(path)) for path in paths]
