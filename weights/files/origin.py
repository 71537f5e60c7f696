"""Where another project's files are: a folder, one file of weights, or a repository of the Hugging Face hub."""

import abc
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.errors import UserError
from cli.locations import Location, in_store, local_copy, locate
from cli.text_files import read_text
from data.hub import HUB, hub_error, spell_size, spell_total
from weights.files.tensors import Tensors, check_finite, read_tensors, unwrapped


@dataclasses.dataclass(frozen=True)
class Leniency:
    """What a user lets pass.

    Attributes:
      keys: of JSON documents, at any depth, that are read as if they were not there.
      nonfinite: weights that are NaN or infinite are said, not refused.
    """

    keys: frozenset[str] = frozenset()
    nonfinite: bool = False


STRICT = Leniency()


class Origin(abc.ABC):
    """Files by name."""

    leniency: Leniency = STRICT

    @abc.abstractmethod
    def describe(self) -> str:
        """Says where the files are from, as exactly as it can be known."""

    @abc.abstractmethod
    def find(self, *names: str) -> Path | None:
        """The first of these files that there is, or None."""

    def require(self, *names: str) -> Path:
        """As `find`.

        Raises:
          UserError: if there is none of them.
        """
        path = self.find(*names)
        if path is None:
            none = "none of" if len(names) > 1 else "no"
            raise UserError(f"{self.describe()} has {none} {', '.join(names)}{self.limits()}; give another --input")
        return path

    def foretell(self, *choices: Sequence[str]) -> None:
        """Says how much several files are together, where files are fetched; of each choice the first that there is."""
        del choices  # nothing is fetched but from the hub

    def json(self, *names: str) -> dict[str, Any]:
        """The JSON object in the first of these files that there is, without the keys that a user lets pass.

        Raises:
          UserError: if there is no such file, or it is no JSON object.
        """
        return without_keys(read_json(self.require(*names)), self.leniency.keys)

    def shard(self, name: str, index: str) -> Path:
        """The file of weights that an index names, which must lie beside it.

        Raises:
          UserError: if there is none, or the name leads to another folder.
        """
        if name in ("", ".", "..") or re.search(r"[/\\\x00]", name):
            raise UserError(f"{index} names the file {name!r}; an index names files of its own folder, without a path")
        path = self.require(name)
        if not self._owns(path):
            raise UserError(f"{path}, which {index} names, is a link out of its folder; put the file itself there")
        return path

    def _owns(self, path: Path) -> bool:
        """Whether a file lies where the origin is, links followed."""
        return True

    def limits(self) -> str:
        """Why a file may not have been found though there is one; continues a sentence."""
        return ""


@dataclasses.dataclass(frozen=True)
class Folder(Origin):
    """A folder of this machine, or of a store, whose files are read from copies."""

    path: Location
    leniency: Leniency = STRICT

    def describe(self) -> str:
        """The folder."""
        return str(self.path)

    def find(self, *names: str) -> Path | None:
        """The first of these files that the folder has."""
        found = next((self.path / name for name in names if _is_file(self.path / name)), None)
        return None if found is None else local_copy(found)

    def _owns(self, path: Path) -> bool:
        if in_store(self.path):  # where there are no links
            return True
        folder, target = path.parent.resolve(), path.resolve()
        # In the hub's cache, which may be given as a folder, files are links from snapshots/<commit>/ to blobs/.
        stores = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
        return any(target.is_relative_to(place) for place in (folder, *stores))


@dataclasses.dataclass(frozen=True)
class WeightsFile(Origin):
    """One file of weights with nothing around it.

    Attributes:
      path: on this machine.
      source: of what that is a copy; "" for the file itself.
    """

    path: Path
    leniency: Leniency = STRICT
    source: str = ""

    def describe(self) -> str:
        """The file."""
        return self.source or str(self.path)

    def find(self, *names: str) -> Path | None:
        """Nothing: what lies beside a file need not belong to it."""
        return None


@dataclasses.dataclass
class HubRepository(Origin):
    """A repository of the Hugging Face hub; its files are fetched one by one into the hub's own cache.

    Each that is not there is said with its size before it is fetched, those of several together before the first.
    HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN and the like are obeyed as huggingface_hub does.
    """

    repository: str
    revision: str | None = None
    leniency: Leniency = STRICT
    _commit: str | None = dataclasses.field(default=None, init=False)

    def describe(self) -> str:
        """Repository and commit, once a file was found."""
        revision = self._commit or self.revision
        return f"{HUB}{self.repository}" + (f"@{revision}" if revision else "")

    def find(self, *names: str) -> Path | None:
        """The first of these files that the repository has.

        Raises:
          UserError: if the repository or the network cannot be reached.
        """
        return next((path for name in names if (path := self._fetch(name)) is not None), None)

    def foretell(self, *choices: Sequence[str]) -> None:
        """Says how many of the files are to be fetched, and how much that is; of one file nothing."""
        import huggingface_hub as hub

        if hub.is_offline_mode():
            return
        try:
            found = [next((file for name in names if (file := self._ask(name)) is not None), None) for names in choices]
        except Exception:  # what is wrong says the download itself
            return
        wanted = [file for file in found if file is not None and file.will_download]
        # An index has files beside it, which are foretold once it is there.
        if len(wanted) > 1 and not any(".index." in file.filename for file in wanted):
            size = spell_total([file.file_size for file in wanted])
            print(f"{HUB}{self.repository}@{wanted[0].commit_hash}: {len(wanted)} files to fetch, {size}", flush=True)

    def limits(self) -> str:
        """That it is the cache where files are looked for, if it is."""
        import huggingface_hub as hub

        return " in the hub's cache, and HF_HUB_OFFLINE is set" if hub.is_offline_mode() else ""

    def _ask(self, name: str) -> Any:
        """What the hub or its cache says of a file, a `DryRunFileInfo`; None if there is no such file."""
        import huggingface_hub as hub
        from huggingface_hub import errors

        try:
            return hub.hf_hub_download(self.repository, name, revision=self._commit or self.revision, dry_run=True)
        except errors.EntryNotFoundError:
            return None

    def _fetch(self, name: str) -> Path | None:
        import huggingface_hub as hub
        from huggingface_hub import errors

        # Every file from the commit of the first one, though somebody pushes meanwhile.
        revision = self._commit or self.revision
        try:
            asked = hub.hf_hub_download(self.repository, name, revision=revision, dry_run=True)
            if asked.will_download:
                origin = f"{HUB}{self.repository}@{asked.commit_hash}"
                print(f"{origin}: fetching {name}, {spell_size(asked.file_size)}", flush=True)
            path = Path(hub.hf_hub_download(self.repository, name, revision=revision))
        except errors.EntryNotFoundError as error:
            # Offline, what is cached is all there is; otherwise the cache was asked because the hub did not answer.
            if isinstance(error, errors.LocalEntryNotFoundError) and not hub.is_offline_mode():
                raise self._error(error, name) from error
            return None
        except Exception as error:  # of the disk, and of whatever library the hub's own uses for the network
            raise self._error(error, name) from error
        folders = [folder for folder in path.parents if folder.parent.name == "snapshots"]
        if self._commit is None and folders:
            self._commit = folders[0].name
        return path

    def _error(self, error: Exception, name: str) -> UserError:
        what = f"{name} of {self.describe()}"
        return hub_error(error, what, self.repository, self.revision, kind="repository", option="--input")


@dataclasses.dataclass(frozen=True)
class Subfolder(Origin):
    """A folder inside another origin."""

    origin: Origin
    folder: str

    def describe(self) -> str:
        """The outer origin and the folder."""
        return f"{self.origin.describe()}, {self.folder}/"

    def find(self, *names: str) -> Path | None:
        """The first of these files that the folder has."""
        return self.origin.find(*(f"{self.folder}/{name}" for name in names))

    @property
    def leniency(self) -> Leniency:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the outer origin."""
        return self.origin.leniency

    def _owns(self, path: Path) -> bool:
        return self.origin._owns(path)

    def foretell(self, *choices: Sequence[str]) -> None:
        """As the outer origin does, of files of the folder."""
        self.origin.foretell(*([f"{self.folder}/{name}" for name in names] for names in choices))

    def limits(self) -> str:
        """Those of the outer origin."""
        return self.origin.limits()


def open_origin(text: str, leniency: Leniency = STRICT) -> Origin:
    """Returns what `--input` names: "hf:organization/name[@revision]", a folder or a file, also gs://BUCKET/NAME.

    Raises:
      UserError: if there is no such folder or file.
    """
    if text.startswith(HUB):
        repository, _, revision = text.removeprefix(HUB).partition("@")
        return HubRepository(repository, revision or None, leniency)
    path = locate(text)
    if path.is_dir():
        return Folder(path, leniency)
    if path.is_file():
        return WeightsFile(local_copy(path), leniency, text if in_store(path) else "")
    raise UserError(f"there is no folder or file {text}; give one, or {HUB}ORGANIZATION/NAME of the Hugging Face hub")


def read_json(path: Location) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: if it is none, or says a key twice.
    """
    try:
        value = json.loads(read_text(path), object_pairs_hook=_object)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return value


def without_keys(value: Any, keys: frozenset[str]) -> Any:
    """A document without those of its keys that a user lets pass, at any depth."""
    if keys and isinstance(value, Mapping):
        return {key: without_keys(entry, keys) for key, entry in value.items() if key not in keys}
    return value


def peek_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that may be something else: {} then."""
    try:
        return read_json(path)
    except UserError:
        return {}


def read_weights(origin: Origin, names: Sequence[str], ignored: str = "(?!)") -> Tensors:
    """Reads the tensors of the first file of `names` that there is, or of the one file that the origin is.

    A name that ends in ".index.json" (or ".index.fp16.json") says which file each tensor is in. Names lose the prefix
    that a training program wrapped all of them in.

    Args:
      origin: where the files are.
      names: of files.
      ignored: a regular expression of whole names of tensors that hold nothing learned, which are left out.

    Raises:
      UserError: if there is none of the files, one cannot be read, an index does not agree with its files, or a value
        is NaN or infinite (unless the origin's leniency lets that pass).
    """
    path = origin.path if isinstance(origin, WeightsFile) else origin.require(*names)
    tensors = _read_shards(origin, path) if re.search(r"\.index(\.\w+)?\.json$", path.name) else read_tensors(path)
    return learned(origin, str(path), tensors, ignored)


def learned(origin: Origin, what: str, tensors: Tensors, ignored: str = "(?!)") -> Tensors:
    """What of a file's tensors is learned, by the network's own names; `read_weights` for tensors that are read.

    Args:
      origin: where they are from.
      what: names the file.
      tensors: name -> array.
      ignored: as in `read_weights`.

    Raises:
      UserError: if a value is NaN or infinite, unless the origin's leniency lets that pass.
    """
    kept = {name: array for name, array in unwrapped(tensors).items() if not re.fullmatch(ignored, name)}
    check_finite(what, kept, allowed=origin.leniency.nonfinite)
    return kept


def _read_shards(origin: Origin, path: Path) -> Tensors:
    """Reads each tensor from the file that the index at `path` assigns it to."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        what = "has no weight_map" if places is None else f"has a weight_map that is {_kind(places)}"
        raise UserError(f"{path} {what}; it must be an object that says of each tensor which file it is in")
    for name, shard in places.items():
        if not isinstance(shard, str):
            raise UserError(f"{path} says of {name} that its file is {_kind(shard)}, not a file's name; fetch it again")
    origin.foretell(*([shard] for shard in sorted(set(places.values()))))
    shards = {shard: origin.shard(shard, str(path)) for shard in sorted(set(places.values()))}
    tensors: Tensors = {}
    unnamed: list[str] = []
    for shard, file in shards.items():
        found = read_tensors(file)
        wanted = [name for name, place in places.items() if place == shard]
        if absent := [name for name in wanted if name not in found]:
            raise UserError(
                f"{path} says that {_few(absent)} is in {shard}, which has no such tensor; fetch both again"
            )
        tensors |= {name: found[name] for name in wanted}
        unnamed += [name for name in found if name not in places]
    if unnamed:
        print(f"warning: {path} does not name {_few(unnamed)}, which its files hold and which are left out")
    return {name: tensors[name] for name in places}


def _few(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, dict):
        return "an empty object" if not value else "an object"
    names = {"NoneType": "null", "list": "a list", "str": "a string", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"the key {twice!r} is there twice")
    return value


def _is_file(path: Location) -> bool:
    """Whether there is such a file; a name that an index gives may be longer than any file's."""
    try:
        return path.is_file()
    except OSError:
        return False
