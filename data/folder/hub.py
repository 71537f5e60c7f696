"""Datasets of the Hugging Face hub: from its cache on this machine, or fetched into it."""

from pathlib import Path

from cli.errors import UserError

HUB = "hf:"


def fetch_dataset(source: str) -> tuple[Path, Path]:
    """Returns the folder of a dataset's files, and the folder that the links in it may lead to.

    HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN and the like are obeyed as huggingface_hub does.

    Args:
      source: "hf:ORGANIZATION/NAME[@REVISION]".

    Raises:
      UserError: if it is neither cached nor can be fetched.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    name, _, revision = source.removeprefix(HUB).partition("@")
    asked = {"repo_id": name, "repo_type": "dataset", "revision": revision or None}
    try:
        try:
            folder = Path(hub.snapshot_download(**asked, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            if hub.is_offline_mode():
                raise
            print(f"fetching {source} into the cache of the Hugging Face hub", flush=True)
            folder = Path(hub.snapshot_download(**asked))
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{source} is not in the cache of the Hugging Face hub, and the hub cannot be reached; fetch it elsewhere "
            "and give its folder as --source"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(f"{source} is gated; accept its terms on the hub and log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{HUB}{name} has no revision {revision!r}; look at the hub for those it has") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"there is no dataset {name!r} on the hub (or it is private and you are not logged in); give "
            f"{HUB}ORGANIZATION/NAME[@REVISION]"
        ) from error
    except Exception as error:  # of the disk, and of whatever library the hub's own uses for the network
        raise UserError(f"cannot fetch {source}: {' '.join(str(error).split())[:200]}") from error
    return folder.resolve(), folder.resolve().parent.parent
