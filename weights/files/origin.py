"""Where another project's files are: a folder, one file of weights, or a repository of the Hugging Face hub."""

import abc
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.errors import UserError
from cli.text_files import read_text
from weights.files.tensors import Tensors, read_tensors

HUB = "hf:"


class Origin(abc.ABC):
    """Files by name."""

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
            one_of = "one of " if len(names) > 1 else ""
            raise UserError(
                f"{self.describe()} has no {one_of}{', '.join(names)}{self._limits()}; give another --input"
            )
        return path

    def _limits(self) -> str:
        """Why a file may not have been found though there is one; continues a sentence."""
        return ""


@dataclasses.dataclass(frozen=True)
class Folder(Origin):
    """A folder of this machine."""

    path: Path

    def describe(self) -> str:
        """The folder."""
        return str(self.path)

    def find(self, *names: str) -> Path | None:
        """The first of these files that the folder has."""
        return next((self.path / name for name in names if (self.path / name).is_file()), None)


@dataclasses.dataclass(frozen=True)
class WeightsFile(Origin):
    """One file of weights with nothing around it."""

    path: Path

    def describe(self) -> str:
        """The file."""
        return str(self.path)

    def find(self, *names: str) -> Path | None:
        """Nothing: what lies beside a file need not belong to it."""
        return None


@dataclasses.dataclass
class HubRepository(Origin):
    """A repository of the Hugging Face hub; its files are fetched one by one into the hub's own cache.

    HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN and the like are obeyed as huggingface_hub does.
    """

    repository: str
    revision: str | None = None
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

    def _limits(self) -> str:
        import huggingface_hub as hub

        return " in the hub's cache, and HF_HUB_OFFLINE is set" if hub.is_offline_mode() else ""

    def _fetch(self, name: str) -> Path | None:
        import huggingface_hub as hub
        from huggingface_hub import errors

        where = self.describe()
        # Every file from the commit of the first one, though somebody pushes meanwhile.
        revision = self._commit or self.revision
        try:
            path = Path(hub.hf_hub_download(self.repository, name, revision=revision))
        except errors.LocalEntryNotFoundError as error:
            if hub.is_offline_mode():  # what is cached is all there is
                return None
            raise UserError(
                f"{where} cannot be reached and {name} is not in the cache; check the network, or fetch the files "
                "elsewhere and give their folder as --input"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise UserError(f"{where} is gated; accept its terms on the hub and log in with `hf auth login`") from error
        except errors.RevisionNotFoundError as error:
            raise UserError(f"{HUB}{self.repository} has no revision {revision!r}") from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise UserError(
                f"there is no repository {self.repository!r} on the hub (or it is private and you are not logged in); "
                f"give {HUB}ORGANIZATION/NAME[@REVISION]"
            ) from error
        except OSError as error:  # HTTP errors and those of the disk
            raise UserError(f"cannot fetch {name} of {where}: {str(error).splitlines()[0]}") from error
        folders = [folder for folder in path.parents if folder.parent.name == "snapshots"]
        if self._commit is None and folders:
            self._commit = folders[0].name
        return path


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

    def _limits(self) -> str:
        return self.origin._limits()


def open_origin(text: str) -> Origin:
    """Returns what `--input` names: "hf:organization/name[@revision]", a folder, or a file.

    Raises:
      UserError: if there is no such folder or file.
    """
    if text.startswith(HUB):
        repository, _, revision = text.removeprefix(HUB).partition("@")
        return HubRepository(repository, revision or None)
    path = Path(text)
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        return WeightsFile(path)
    raise UserError(f"there is no folder or file {text}; give one, or {HUB}ORGANIZATION/NAME of the Hugging Face hub")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: if it is none.
    """
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return value


def peek_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that may be something else: {} then."""
    try:
        return read_json(path)
    except UserError:
        return {}


def read_weights(origin: Origin, names: Sequence[str]) -> Tensors:
    """Reads the tensors of the first file of `names` that there is, or of the one file that the origin is.

    A name that ends in ".index.json" lists the files that tensors are spread over.

    Raises:
      UserError: if there is none of them, or it cannot be read.
    """
    path = origin.path if isinstance(origin, WeightsFile) else origin.require(*names)
    if not path.name.endswith(".index.json"):
        return read_tensors(path)
    shards = read_json(path).get("weight_map", {})
    tensors: Tensors = {}
    for name in sorted(set(shards.values())):
        tensors |= read_tensors(origin.require(name))
    return tensors
