"""Where files are: on this machine, or in a store of objects, gs://BUCKET/NAME. The one door for either.

A location on this machine is a `pathlib.Path`, and is read and written as one. A location in a store is an
`epath.Path`, which answers alike: `/`, `name`, `open`, `read_text`, `is_file`, `iterdir`, `glob`, `unlink`. A store has
no folders, no rename, no append and no locks. So

- a file is written by `write_whole`: on this machine as a draft that gets its name, in a store at once, where an object
  is there when all of it has arrived and not before;
- a folder in a store is whole when its marker is there, the file that `upload` writes last; Orbax does the same with a
  checkpoint;
- what has to be on this machine (an array that is mapped into memory) is read from `local_copy`.

Credentials are Google's application default ones.
"""

import base64
import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any

from etils import epath

from cli.compilation_cache import cache_home
from cli.errors import Outage, UserError

if TYPE_CHECKING:
    Location = Path  # which epath.Path is, in what this project asks of it
else:
    Location = Path | epath.Path

# epath would import TensorFlow wherever it is installed; whoever uses it first decides, and that may be a library.
os.environ.setdefault("EPATH_USE_TF", "false")

_STORE = "gs"

_LOG_IN = "`gcloud auth application-default login`, or a machine with a service account"


def locate(place: str | os.PathLike[str]) -> Location:
    """The location that a user names.

    Raises:
      UserError: if it is in a store of another kind, or one that cannot be reached: no library for it, no credentials,
        no such bucket, no network.
    """
    text = os.fspath(place)
    if collapsed := re.match(r"([a-z][a-z0-9]+):/(?!/)", text):
        raise UserError(f"{text} has lost a slash; write it as {collapsed[1]}://{text[collapsed.end() :]}")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme != _STORE:
        raise UserError(f"{text} is of a kind that is not read or written here; give a local path, or gs://BUCKET/NAME")
    bucket, _, name = rest.partition("/")
    if not bucket or "//" in rest or {".", ".."} & set(name.split("/")):
        raise UserError(f"{text} names no place in a bucket; write it as gs://BUCKET/NAME")
    _reach(bucket)
    return epath.Path(text)  # pyright: ignore[reportReturnType]


def locate_from_home(place: str | os.PathLike[str]) -> Location:
    """As `locate`, where `~` and `~name` stand for home folders.

    Raises:
      UserError: as `locate`, and if nobody has that home.
    """
    location = locate(place)
    try:
        return location.expanduser()
    except RuntimeError as error:
        raise UserError(f"{place} begins with a home folder that nobody has; give the whole path") from error


def local(place: str | os.PathLike[str], what: str) -> Path:
    """A path on this machine, for what is not kept in a store.

    Args:
      place: as a user names it.
      what: names it in the error, such as "--out".

    Raises:
      UserError: if it is in a store.
    """
    if "://" in os.fspath(place):
        raise UserError(f"{what}={place} must be on this machine; give a local path, and copy with `gcloud storage cp`")
    return Path(place)


def in_store(location: PurePath) -> bool:
    """Whether a location is in a store, and not on this machine."""
    return isinstance(location, epath.Path)


def is_bucket(location: Location) -> bool:
    """Whether a location is the root of a store's bucket, beside which there are only other people's."""
    return in_store(location) and not str(location).partition("://")[2].strip("/").partition("/")[2]


def absolute(location: Location) -> Location:
    """The location without regard to the working directory, symbolic links followed."""
    return location if in_store(location) else location.resolve()


def make_folder(location: Location) -> None:
    """Makes a folder, and those it lies in, where there are folders."""
    if not in_store(location):
        location.mkdir(parents=True, exist_ok=True)


def write_whole(location: Location, content: str | bytes) -> None:
    """Writes a file, whole or not at all: a reader sees what was there before, or all of the new.

    What is there and is no file, such as a pipe or /dev/stdout, is written to as it is.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if in_store(location):
        location.write_bytes(data)
        return
    if location.exists() and not location.is_file():
        location.write_bytes(data)
        return
    draft = location.with_name(f"{location.name}.tmp")
    draft.write_bytes(data)
    draft.replace(location)


def create(location: Location, content: str) -> bool:
    """Writes a file of a store unless one is there, of which the store itself makes sure; returns whether it did."""
    import fsspec

    sink: Any = fsspec.filesystem(_STORE).open(str(location), "xb")
    sink.write(content.encode("utf-8"))
    try:
        sink.close()
    except FileExistsError:
        sink.closed = True
        return False
    return True


def upload(folder: Path, target: Location, marker: str = "") -> None:
    """Copies the files of a folder into a store, `marker` last, with which the copy is whole.

    Args:
      folder: on this machine.
      target: in a store; what is there under the same names is replaced.
      marker: name of one of the files; "" where nobody asks.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path == folder / marker):
        with path.open("rb") as source, open_upload(target / path.relative_to(folder).as_posix()) as sink:
            shutil.copyfileobj(source, sink, 2**20)


@contextlib.contextmanager
def open_upload(location: Location) -> Iterator[IO[bytes]]:
    """A file in a store to be written, which is there when the block has ended, and as it was if an error ends it."""
    sink: Any = location.open("wb")
    try:
        yield sink
    except BaseException:
        with contextlib.suppress(Exception):  # the store forgets what nobody finishes
            sink.discard()
        sink.closed = True  # or to forget the object would put what it has
        raise
    sink.close()


def local_copy(location: Location) -> Path:
    """A file of a store as one on this machine, copied once; itself where it is here already.

    Copies lie under `${XDG_CACHE_HOME:-~/.cache}/tessera/copies`. One is used again while the file in the store is of
    the same writing (its generation), and removed when a copy of a later one is made.

    Raises:
      Outage: if what arrives is not what the store says it has.
    """
    if not in_store(location):
        return location
    about = _describe(location)
    version = " ".join(str(about.get(key, "")) for key in ("generation", "md5Hash", "size", "updated"))
    copies = cache_home() / "tessera" / "copies" / _digest(str(location))
    path = copies / _digest(version) / location.name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # another process may be copying it too
    try:
        with location.open("rb") as source, draft.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
        if not _is_copy(draft, about):
            raise Outage(f"{location} did not arrive whole, or was written meanwhile; start the command again")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    for other in copies.iterdir():
        if other != path.parent:
            shutil.rmtree(other, ignore_errors=True)
    return path


def _describe(location: Location) -> dict[str, Any]:
    """What a store says of a file: "size" in bytes, "generation", "md5Hash" (base64) if it was not composed."""
    import fsspec

    return fsspec.filesystem(_STORE).info(str(location))


def _is_copy(path: Path, about: dict[str, Any]) -> bool:
    """Whether a file is the one that a store described."""
    if path.stat().st_size != int(about["size"]):
        return False
    if "md5Hash" not in about:
        return True
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode() == about["md5Hash"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def explain(error: BaseException) -> UserError | None:
    """What to tell a user of an error that a store, or the way to it, raised; None of any other error."""
    text = " ".join(str(error).split())
    module, kind = type(error).__module__, type(error).__name__
    unreached = Outage(f"the store cannot be reached ({kind}: {text[:300]}); check the network, and start again")
    if module.startswith("google.auth") and kind == "TransportError":
        return unreached
    if module.startswith("google.auth") or (module.startswith("gcsfs") and getattr(error, "code", None) == 401):
        return UserError(
            f"no credentials for gs:// were found, or they are no longer valid ({text[:200]}); use {_LOG_IN}"
        )
    if isinstance(error, OSError) and text.startswith("Forbidden: "):
        reason = text.partition(" ")[2].partition(" ")[2] or text
        return UserError(
            f"the store refused ({reason[:300]}); ask for that right on the bucket, or use other credentials: {_LOG_IN}"
        )
    if module.startswith(("gcsfs", "google.api_core", "google.cloud", "aiohttp", "requests")):
        return unreached
    if isinstance(error, RuntimeError) and " gs://" in text:  # of ArrayRecord
        mistake = re.search("NOT_FOUND|PERMISSION_DENIED|UNAUTHENTICATED", text)
        line = f"a file of the store cannot be read: {text[:300]}; check that it is there, and start the command again"
        return UserError(line) if mistake else Outage(line)
    return None


@functools.cache
def _reach(bucket: str) -> None:
    """Makes sure, once, that a bucket is there and that this process may look into it.

    Raises:
      UserError: if not.
    """
    for name in ("gcsfs", "google"):  # they log what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        import fsspec.config

        # What other machines, and TensorStore in this process, write must be seen.
        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
        there = epath.Path(f"{_STORE}://{bucket}").exists()
    except ImportError as error:
        raise UserError(f"gs:// needs the library gcsfs ({error}); run `pip install -e '.[gcs]'`") from error
    except Exception as error:
        raise explain(error) or Outage(f"gs://{bucket} cannot be reached: {error}") from error
    if not there:
        raise UserError(
            f"there is no bucket gs://{bucket}; make it with `gcloud storage buckets create`, or name another"
        )
