"""Repositories of the Hugging Face hub: the files of a dataset, and what the hub's answers mean to a user."""

from pathlib import Path
from typing import Literal

from cli.errors import UserError

HUB = "hf:"


def fetch_dataset(source: str) -> tuple[Path, Path]:
    """Returns the folder of a dataset's files, and the folder that the links in it may lead to.

    What its cache on this machine lacks of it is fetched; where the hub cannot be reached, the cache is all there is.
    HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN and the like are obeyed as huggingface_hub does.

    Args:
      source: "hf:ORGANIZATION/NAME[@REVISION]".

    Raises:
      UserError: if it is neither cached nor can be fetched.
    """
    import huggingface_hub as hub

    name, _, revision = source.removeprefix(HUB).partition("@")
    if not hub.is_offline_mode():
        print(f"{source}: fetching what the cache of the Hugging Face hub lacks", flush=True)
    try:
        folder = Path(hub.snapshot_download(repo_id=name, repo_type="dataset", revision=revision or None)).resolve()
    except Exception as error:  # of the disk, and of whatever library the hub's own uses for the network
        raise hub_error(error, source, name, revision, kind="dataset", option="--source") from error
    return folder, folder.parent.parent


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
            return UserError(
                f"{what} is not in the cache of the Hugging Face hub, or in part, and the hub cannot be reached; check "
                f"the network, or fetch it elsewhere and give the folder as {option}"
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
