"""A run folder: what a training run leaves behind, and all that sampling and evaluation need."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cli.config import from_json
from cli.errors import UserError
from data.tokenizer import Tokenizer
from weights.checkpoint import CheckpointStore

Tree = Any

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVALUATION = "evaluation.json"
TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
IDENTITY = "wandb/id"
DONE = "DONE"

PROVENANCE = "provenance"  # the key of config.json that a pretrained folder has and a run has not


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """Trained weights of a run.

    Attributes:
      params: {part: tree}: exponential moving average if the run keeps one and it was asked for.
      variables: {part: {collection: tree}}; may be empty.
      step: of the checkpoint.
      ema: whether `params` is the moving average.
    """

    params: Tree
    variables: Tree
    step: int
    ema: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that exists."""

    folder: Path
    config: ConfigDict

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Opens a run folder.

        Raises:
          UserError: if there is none, or its config cannot be read; if it is a pretrained folder.
        """
        config = read_config(folder)
        if PROVENANCE in config:
            raise UserError(f"{folder} is a pretrained folder, not a run; name it as a `source` in a config")
        return cls(Path(folder), config)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was copied into the run, or None for a run without text."""
        path = self.folder / TOKENIZER
        return Tokenizer.load(path) if path.is_file() else None

    def identity(self) -> str:
        """The run's id, random, constant over its life and carried along by a copy or a move; "" if it has none."""
        path = self.folder / IDENTITY
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def latest_step(self) -> int:
        """Step of the newest checkpoint.

        Raises:
          UserError: if there is none yet.
        """
        steps = CheckpointStore(self.folder / CHECKPOINTS).steps()
        if not steps:
            raise UserError(f"{self.folder} has no checkpoint yet; wait for the first one or train further")
        return steps[0]

    def load(self, step: int | None = None, ema: bool = True) -> RunWeights:
        """Reads weights.

        Args:
          step: of the checkpoint; None for the newest one.
          ema: take the moving average where there is one.

        Raises:
          UserError: if there is no such checkpoint or it cannot be read.
        """
        store = CheckpointStore(self.folder / CHECKPOINTS)
        latest = self.latest_step()
        if step is not None and step not in store.steps():
            raise UserError(f"{self.folder} has no checkpoint {step}; it has {', '.join(map(str, store.steps()))}")
        step = latest if step is None else step
        ema = ema and "ema_params" in store.abstract(step)
        name = "ema_params" if ema else "params"
        trees = store.load(step, (name, "variables"))
        return RunWeights(trees[name], trees["variables"], step, ema)


def read_config(folder: str | Path) -> ConfigDict:
    """Reads the config of a run folder or a pretrained folder.

    Raises:
      UserError: if there is none, or it cannot be read.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        what = "is not a run folder (it has no config.json)" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}; train one with `python -m train --config=... --workdir={folder}`")
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it or train again") from error


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of a run's metrics.jsonl, oldest first; a last line that a crash cut short is left out."""
    path = Path(folder) / METRICS
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
