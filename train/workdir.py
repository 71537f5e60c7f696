"""The run folder from the side of training: made, checked against the config, and completed."""

import os
import re
from pathlib import Path

from ml_collections import ConfigDict

from cli.config import flatten, from_json, to_json
from cli.errors import UserError
from data.pipeline import load_tokenizer
from data.tokenizer import Tokenizer
from weights.run import CONFIG, TOKENIZER, Run
from weights.sources import resolve_frozen

# What may change between the starts of one run: nothing that an update depends on, but for its length and batch size.
CHANGEABLE = re.compile(
    r"(steps|batch_size|group|(mesh|log|checkpoint|evaluate|wandb)\..*|data\.(workers|read_ahead|cache|data_dir)"
    r"|frozen\.\w+\.source)"  # a run may move; the step of a frozen stage is pinned
)


def pin_frozen(config: ConfigDict, workdir: Path, resuming: bool) -> None:
    """Finds the frozen stages; a run that goes on keeps the checkpoints of them that it began with."""
    if resuming and (workdir / CONFIG).is_file():
        begun = Run.open(workdir).config.frozen
        for part, entry in config.frozen.items():
            if part in begun and "step" in begun[part] and not entry.get("step", 0):
                with config.unlocked():
                    entry.step = begun[part].step
    resolve_frozen(config, near=workdir if resuming else None)


def open_workdir(workdir: Path, config: ConfigDict, resuming: bool) -> None:
    """Makes the run folder, or checks that it belongs to this config."""
    path = workdir / CONFIG
    if resuming and path.is_file():
        before, now = flatten(from_json(path.read_text(encoding="utf-8"))), flatten(config)
        changed = sorted(
            key
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key) and not CHANGEABLE.fullmatch(key)
        )
        if changed:
            shown = ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
            raise UserError(f"{workdir} was started with another config ({shown}); use a new --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(to_json(config), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the workdir {workdir}: {error.strerror}; choose another --workdir") from error


def copy_tokenizer(config: ConfigDict, workdir: Path, resuming: bool) -> Tokenizer | None:
    """Copies the dataset's tokenizer into the run, for configs with text."""
    if not config.data.text_length:
        return None
    own = workdir / TOKENIZER
    if not (resuming and own.is_file()):
        load_tokenizer(config.data.dataset, config.data.data_dir).save(own)
    return Tokenizer.load(own)


def wandb_id(workdir: Path) -> str:
    """An id that stays with the run folder."""
    path = workdir / "wandb" / "id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(os.urandom(4).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8")
