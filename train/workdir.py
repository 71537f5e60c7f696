"""The run folder from the side of training: made, checked against the config, and completed."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from cli.config import flatten, to_json
from cli.errors import UserError
from cli.locations import Location, make_folder, write_whole
from data.pipeline import load_tokenizer, load_writer
from train.checks import writes_otherwise
from train.objectives import create_objective
from weights.run import CONFIG, IDENTITY, TOKENIZER, WRITES_WITH, Run, read_config
from weights.sources import RANDOM, resolve_frozen
from weights.starts import bases_of, pin_bases

# What may change between the starts of one run: its length and batch size, what no update depends on but for rounding
# (mesh, kernel of attention), where things are (a run may move; identity and step of a frozen stage are pinned), and
# what to do about an update that is not finite.
CHANGEABLE = re.compile(
    r"steps|batch_size|nonfinite|(mesh|log|checkpoint|wandb)\..*|data\.(workers|processes|read_ahead|data_dir)"
    r"|frozen\.\w+\.source|(models|frozen)\.\w+\.implementation"
)


def pin_sources(config: ConfigDict, workdir: Location, resuming: bool) -> None:
    """Finds the frozen stages, and the networks that low-rank pairs are added to.

    A run that goes on keeps the checkpoints of them that it began with.
    """
    if resuming and (workdir / CONFIG).is_file():
        begun = Run.open(workdir).config
        for part, entry in config.frozen.items():
            if part in begun.frozen and "step" in begun.frozen[part] and not entry.get("step", 0):
                with config.unlocked():
                    entry.step = begun.frozen[part].step
        for base in bases_of(config):
            with config.unlocked():
                base.entry.update(
                    {k: v for k, v in begun.initialize.get(base.name, {}).items() if k in ("step", "run")}
                )
    near = workdir if resuming else None
    resolve_frozen(config, near)
    pin_bases(config, near)


def open_workdir(workdir: Location, config: ConfigDict, resuming: bool) -> None:
    """Makes the run folder, or checks that it belongs to this config."""
    path = workdir / CONFIG
    if path.is_file() and Run.open(workdir).converted:
        raise UserError(
            f"{workdir} holds weights that were trained elsewhere; choose another --workdir, and start from them with "
            f"--config.initialize.<part>.source={workdir}"
        )
    if resuming and path.is_file():
        before, now = flatten(read_config(workdir)), flatten(config)
        changed = {
            key
            for key in before.keys() | now.keys()
            if not _may_change(config, key) and (key not in before or key not in now or before[key] != now[key])
        }
        changed -= {key for key in changed - before.keys() if _has_default(config, key)}
        if changed:
            then, value = ({key: repr(side[key]) for key in changed & side.keys()} for side in (before, now))
            pairs = (f"{key}: {then.get(key, 'absent')} -> {value.get(key, 'absent')}" for key in sorted(changed))
            shown = ", ".join(pairs)
            raise UserError(f"{workdir} was started with another config ({shown}); use a new --workdir")
    try:
        make_folder(workdir)
    except OSError as error:
        raise UserError(f"cannot write the workdir {workdir}: {error.strerror}; choose another --workdir") from error
    write_whole(path, to_json(config))


def _may_change(config: ConfigDict, key: str) -> bool:
    """Whether a run may go on with another value of a key."""
    moved = config.lora.rank and re.fullmatch(r"initialize\.\w+\.source", key)  # whose identity is pinned
    return bool(CHANGEABLE.fullmatch(key) or moved)


def _has_default(config: ConfigDict, key: str) -> bool:
    """Whether networks, process, loss and sampler are the same without a key: then an older version did the same."""
    without = config.copy_and_resolve_references()
    *parents, last = key.split(".")
    node = without
    for parent in parents:
        node = node[parent]
    with node.unlocked():
        del node[last]
    try:
        return create_objective(without) == create_objective(config)
    except UserError:  # it has no default
        return False


def copy_tokenizers(config: ConfigDict, workdir: Location, resuming: bool) -> None:
    """Copies the config's tokenizer into the run, for configs with text, and that of a captioner with another one."""
    own, caption = workdir / TOKENIZER, workdir / WRITES_WITH
    if config.data.text_length and not (resuming and own.is_file()):
        load_tokenizer(config.data).save(own)
    if resuming and caption.is_file():
        return
    caption.unlink(missing_ok=True)  # of a start that failed
    if (writer := load_writer(config.data)) is not None:
        writer.save(caption)
    if writes_otherwise(config) and config.frozen.captioner.source != RANDOM:
        source = Run.open(config.frozen.captioner.source)
        if (tokenizer := source.tokenizer(WRITES_WITH)) is not None:
            tokenizer.save(caption)
        else:
            print(f"warning: {source.folder} has no {WRITES_WITH}, which reads what its captioner writes", flush=True)


@contextlib.contextmanager
def storage_errors(workdir: Location) -> Iterator[None]:
    """Turns an error of the file system that a user can mend into one line.

    Raises:
      UserError: in place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(workdir)
        if error.errno not in _STORAGE or elsewhere:
            raise
        raise UserError(
            f"cannot write the workdir {workdir}: {error.strerror}; free space or allow writing there (or choose "
            "another --workdir), and start the same command again; checkpoints that were finished are intact"
        ) from error


_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def wandb_id(workdir: Location) -> str:
    """An id that stays with the run folder."""
    run_id = Run(workdir, ConfigDict()).identity()
    if not run_id:
        run_id = os.urandom(4).hex()
        path = workdir / IDENTITY
        make_folder(path.parent)
        write_whole(path, run_id)
    return run_id
