"""Checkpoints: the only file that reads and writes Orbax.

A checkpoint is a folder `<step>` of named trees (`params`, `ema_params`, ...), so that a reader takes only the trees it
wants and needs no code of the training run.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterable
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from cli.errors import Outage, UserError
from cli.locations import Location, absolute, explain, in_store, locate, make_folder

Tree = Any

# Orbax reports every save, and logs the traceback of an error that it raises as well; what a user must know is said by
# this file.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class UnreadableCheckpoint(UserError):
    """A checkpoint is damaged; an older one may be whole."""


class CheckpointStore:
    """The checkpoints of one run.

    Saving is asynchronous and atomic: a folder has its final name only when it is whole. In a store of objects it is
    whole when `commit_success.txt` is in it, which Orbax writes last.
    """

    def __init__(self, folder: str | Location, keep: int | None = None):
        """Opens `folder`.

        Args:
          folder: where the step folders are; made by the first save.
          keep: how many of the newest checkpoints stay; None keeps all (and suits a reader).
        """
        self.folder = absolute(locate(folder))
        self._keep = keep
        self._writer: ocp.training.Checkpointer | None = None

    def steps(self) -> list[int]:
        """Steps that have a folder with something in it, in a store all of it, newest first."""
        if not self.folder.is_dir():
            return []
        named = [path for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir()]
        return sorted((int(path.name) for path in named if self._is_saved(path)), reverse=True)

    def unfinished(self) -> list[str]:
        """Names of what a save left behind that was cut short: of a temporary name, empty, or in a store not whole."""
        if not self.folder.is_dir():
            return []
        folders = [path for path in self.folder.iterdir() if path.is_dir()]
        return sorted(
            path.name
            for path in folders
            if _TEMPORARY in path.name or (path.name.isdigit() and not self._is_saved(path))
        )

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, or takes its mark away, so that it is none but can be looked at."""
        with contextlib.suppress(FileNotFoundError):  # another process may have been quicker
            if in_store(self.folder):
                (self.folder / str(step) / _COMMITTED).unlink()
                return
            (self.folder / str(step)).rename(self.folder / f"{step}.unreadable")

    def remove_after(self, step: int) -> None:
        """Removes checkpoints of later steps: what a run that goes on from `step` will make again."""
        for number in self.steps():
            if number <= step:
                continue
            folder: Any = self.folder / str(number)
            with contextlib.suppress(FileNotFoundError):  # another process may have been quicker
                if in_store(folder):
                    (folder / _COMMITTED).unlink()  # first: what is cut short here is no checkpoint
                    folder.rmtree()
                else:
                    shutil.rmtree(folder)

    def save(self, step: int, trees: dict[str, Tree]) -> None:
        """Begins to save named trees; an error of an earlier background save is raised here or by `close`.

        Raises:
          UserError: if the folder cannot be written (permissions, disk full).
        """
        try:
            writer = self._open_writer()
            self._remove_leftovers(step)
            writer.save_checkpointables_async(step, _without_empty(trees), force=True)
        except Exception as error:  # also what an earlier save in the background met
            raise self._unwritable(error) from error

    def restore(self, step: int, abstract: dict[str, Tree]) -> dict[str, Tree]:
        """Reads named trees into the shapes, dtypes and shardings of `abstract` (ShapeDtypeStructs).

        Raises:
          UserError: see `check`.
          UnreadableCheckpoint: if it is damaged.
        """
        self.check(step, abstract)
        try:
            loaded = ocp.load_checkpointables(self.folder / str(step), _without_empty(abstract))
        except Exception as error:
            raise self._unreadable(step, error) from error
        return {name: loaded.get(name, tree) for name, tree in abstract.items()}

    def check(self, step: int, abstract: dict[str, Tree]) -> None:
        """Looks at what a checkpoint says of itself, which each process can do on its own: reading it is collective.

        Raises:
          UserError: if a tree is missing or has other paths or shapes than wanted (all of them listed).
          UnreadableCheckpoint: if it is damaged.
        """
        stored = self.abstract(step)
        problems = []
        for name, tree in _without_empty(abstract).items():
            problems += _differences(name, tree, stored.get(name, {}))
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise UserError(f"checkpoint {self.folder / str(step)} does not fit this config: {shown}")

    def abstract(self, step: int, sharding: jax.sharding.Sharding | None = None) -> dict[str, Tree]:
        """Returns the shapes and dtypes of every tree of a checkpoint, optionally to be placed by `sharding`.

        Raises:
          UnreadableCheckpoint: if it is damaged.
        """
        try:
            metadata = ocp.checkpointables_metadata(self.folder / str(step)).metadata
            trees = {
                name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
                for name, tree in metadata.items()
                if name not in _NOT_TREES
            }
            # Orbax only logs that a metadata file is broken, and takes it for an empty one.
            if not jax.tree.leaves(trees):
                raise ValueError("it holds nothing, or its metadata is broken")
            return trees
        except Exception as error:
            raise self._unreadable(step, error) from error

    def load(self, step: int, names: Iterable[str]) -> dict[str, Tree]:
        """Reads whole trees by name onto the first device; a name that the checkpoint lacks gives {}."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        stored = self.abstract(step, here)
        wanted = {name: stored[name] for name in names if name in stored}
        return {**dict.fromkeys(names, {}), **self.restore(step, wanted)}

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: if a save failed.
        """
        if self._writer is not None:
            try:
                self._writer.wait()
            except Exception as error:
                raise self._unwritable(error) from error

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open_writer(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            make_folder(self.folder)
            policy = ocp.training.preservation_policies.LatestN(self._keep) if self._keep else None
            # The processes of a run meet at barriers, and two stores that save at once must not meet at each other's.
            context = ocp.Context(
                multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.folder.name)
            )
            self._writer = ocp.training.Checkpointer(self.folder, context=context, preservation_policy=policy)
        return self._writer

    def _is_saved(self, folder: Location) -> bool:
        return (folder / _COMMITTED).is_file() if in_store(folder) else any(folder.iterdir())

    def _remove_leftovers(self, step: int) -> None:
        """An empty folder of that name (a crashed copy, say) would be taken for a checkpoint by Orbax."""
        folder = self.folder / str(step)
        if in_store(folder):
            return  # where no folder is empty
        with contextlib.suppress(FileNotFoundError):  # another process may have been quicker
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _unwritable(self, error: Exception) -> UserError:
        """What to raise for an error of saving."""
        _silence_late_writes()
        text = _root_cause(error)
        refused = not in_store(self.folder) or any(word in text for word in _REFUSED)
        return (UserError if refused else Outage)(f"cannot save a checkpoint in {self.folder}: {text}")

    def _unreadable(self, step: int, error: Exception) -> Exception:
        """What to raise for an error of reading: damage, unless it is the machine's trouble and not the file's."""
        text = _root_cause(error)
        if isinstance(error, jax.errors.JaxRuntimeError | MemoryError) or any(word in text for word in _NOT_DAMAGE):
            return UserError(f"checkpoint {self.folder / str(step)} cannot be read here: {text}")
        if in_store(self.folder) and (explained := explain(_deepest(error))) is not None:
            return explained
        return UnreadableCheckpoint(f"checkpoint {self.folder / str(step)} cannot be read: {text}")


_NOT_TREES = ("metrics",)
_TEMPORARY = "orbax-checkpoint-tmp"
_COMMITTED = "commit_success.txt"  # in a store
# Of errors that say nothing about the file: no right to read it, no room for it, other processes that do not answer.
_NOT_DAMAGE = ("PERMISSION_DENIED", "Permission denied", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
# Of errors of a store that asking again would not mend.
_REFUSED = ("Forbidden", "PERMISSION_DENIED", "UNAUTHENTICATED", "does not have", "NOT_FOUND", "does not exist")


def _without_empty(trees: dict[str, Tree]) -> dict[str, Tree]:
    """Orbax stores no tree without leaves."""
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def _differences(name: str, wanted: Tree, stored: Tree) -> list[str]:
    """Says path by path how a stored tree differs from the wanted one."""
    want, have = _by_path(wanted), _by_path(stored)
    lines = [f"missing {name}/{path}" for path in want.keys() - have.keys()]
    lines += [f"unexpected {name}/{path}" for path in have.keys() - want.keys()]
    lines += [
        f"{name}/{path} has shape {have[path]}, not {shape}"
        for path, shape in want.items()
        if path in have and have[path] != shape
    ]
    return sorted(lines)


def _by_path(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _silence_late_writes() -> None:
    """Keeps TensorStore from printing a traceback for each write that ends after the one that failed.

    It reports them to an event loop, which Orbax has closed by then.
    """
    report = sys.unraisablehook

    def report_others(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            report(event)

    sys.unraisablehook = report_others


def _deepest(error: BaseException) -> BaseException:
    """The deepest cause: Orbax wraps what went wrong in messages about handlers."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType]
    return error


def _root_cause(error: BaseException) -> str:
    """The first line of the deepest cause."""
    error = _deepest(error)
    return (str(error) or type(error).__name__).splitlines()[0]
