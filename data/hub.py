"""Repositories of the Hugging Face hub: the files of a dataset, and what the hub's answers mean to a user."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cli.errors import UserError
from cli.plurals import spell_count

HUB = "hf:"


def fetch_dataset(source: str) -> tuple[Path, Path]:
    """Returns the folder of a dataset's files, and the folder that the links in it may lead to.

    What its cache on this machine lacks of it is said, with its size, and fetched; where the hub cannot be reached, the
    cache is all there is. HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN and the like are obeyed as huggingface_hub does.

    Args:
      source: "hf:ORGANIZATION/NAME[@REVISION]".

    Raises:
      UserError: if it is neither cached nor can be fetched.
    """
    import huggingface_hub as hub

    name, _, revision = source.removeprefix(HUB).partition("@")
    if not hub.is_offline_mode():
        _say_what_is_fetched(source, name, revision or None)
    try:
        folder = Path(hub.snapshot_download(repo_id=name, repo_type="dataset", revision=revision or None)).resolve()
    except Exception as error:  # of the disk, and of whatever library the hub's own uses for the network
        raise hub_error(error, source, name, revision, kind="dataset", option="--source") from error
    return folder, folder.parent.parent


def spell_size(size: int | None) -> str:
    """A number of bytes as "3.438 GB" (10^9), or that the hub does not say it."""
    if size is None:
        return "of unknown size"
    for unit, bytes_of_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.4g} {unit}"
    return spell_count(size, "byte")


def spell_total(sizes: Sequence[int | None]) -> str:
    """The size of several files, or that the hub does not say it of one."""
    known = [size for size in sizes if size is not None]
    return spell_size(sum(known) if len(known) == len(sizes) else None)


def _say_what_is_fetched(source: str, name: str, revision: str | None) -> None:
    """Prints how many files of a dataset are not in the cache, the first of them, and the size of all."""
    import huggingface_hub as hub

    try:
        files = hub.snapshot_download(repo_id=name, repo_type="dataset", revision=revision, dry_run=True)
    except Exception:  # what is wrong says the download itself, unless the cache is enough for it
        return
    wanted = [file for file in files if file.will_download]
    if wanted:
        size = spell_total([file.file_size for file in wanted])
        few = ", ".join(file.filename for file in wanted[:3]) + (", ..." if len(wanted) > 3 else "")
        print(f"{source}: fetching {len(wanted)} of {spell_count(len(files), 'file')}, {size}: {few}", flush=True)


def hub_error(
    error: Exception,
    what: str,
    repository: str,
    revision: str | None,
    *,
    kind: Literal["dataset", "repository"],
    option: str,
) -> UserError:
    """What to raise of an error of huggingface_hub, or of what it uses.

    Args:
      error: that it raised.
      what: was asked for.
      repository: "ORGANIZATION/NAME", as a user gave it.
      revision: of it, if one was named.
      kind: of repository.
      option: that takes a folder in its place.
    """
    from huggingface_hub import errors

    match error:
        case errors.LocalEntryNotFoundError():
            # A repository need not have every file that is looked for, and only the hub tells.
            cached = "set HF_HUB_OFFLINE=1 to go on with the files that are, " if kind == "repository" else ""
            return UserError(
                f"{what} is not in the cache of the Hugging Face hub, or in part, and the hub cannot be reached; check "
                f"the network, {cached}or fetch it elsewhere and give the folder as {option}"
            )
        case errors.GatedRepoError():
            return UserError(f"{HUB}{repository} is gated; accept its terms on the hub and log in with `hf auth login`")
        case errors.RevisionNotFoundError():
            return UserError(f"{HUB}{repository} has no revision {revision!r}; look at the hub for those it has")
        case errors.RepositoryNotFoundError() | errors.HFValidationError():
            return UserError(
                f"there is no {kind} {repository!r} on the hub (or it is private and you are not logged in); give "
                f"{HUB}ORGANIZATION/NAME[@REVISION]"
            )
        case _:
            return UserError(f"cannot fetch {what}: {' '.join(str(error).split())[:200] or type(error).__name__}")
