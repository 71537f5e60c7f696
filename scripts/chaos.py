"""`python -m scripts.chaos --config=FILE --workdir=FOLDER`: kills a run at random moments, and compares its end."""

import dataclasses
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cli import entry_point
from cli.config import load_config
from cli.errors import EXIT_FAILURE, EXIT_OK, UserError
from cli.locations import local
from cli.plurals import spell_count
from cli.ranges import check_seed

_DESCRIPTION = """\
Trains a config twice: once without interruption, and once killed (SIGKILL) at random moments and started again each
time with the same command. Both must end alike to the bit: parameters, moving average, variables, optimizer state,
metrics (fields under time/ aside), previews, and the id of the W&B run.

  --config=FILE[:ARGUMENT]   the config; --config.KEY=VALUE overrides a key

A tenth of the kills fall while the process starts, four tenths while it saves, the others between the first update and
the one where the next kill is planned. Exit code 0: alike; 1: not.
"""

_POLL = 0.002  # seconds


@dataclasses.dataclass
class Chaos:
    """One run that is killed again and again.

    Attributes:
      train: the command that trains, without --workdir.
      workdir: the run folder.
      steps: length of the run.
      random: draws the moments.
    """

    train: list[str]
    workdir: Path
    steps: int
    random: random.Random

    def run(self, kills: int, say: Callable[[str], None]) -> Counter[str]:
        """Kills the run `kills` times, lets it finish, and returns how often it was killed in which phase.

        Raises:
          UserError: if the run ends by itself other than by finishing.
        """
        phases: Counter[str] = Counter()
        startup = 5.0
        while phases.total() < kills:
            share = (self.steps - self._step()) / (kills - phases.total())
            process = self._start()
            phase = self._wait(process, startup, share)
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            phases[phase] += 1
            say(f"kill {phases.total()}: {phase}, at step {self._step()} of {self.steps}")
        process = self._start()
        if process.wait():
            raise UserError(f"the run ended with {process.returncode}; see {self._log}")
        return phases

    @property
    def _log(self) -> Path:
        return self.workdir.with_suffix(".log")

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("a") as log:
            return subprocess.Popen([*self.train, f"--workdir={self.workdir}"], stdout=log, stderr=log)

    def _wait(self, process: "subprocess.Popen[bytes]", startup: float, share: float) -> str:
        """Waits for the moment to kill and returns its phase."""
        draw, begun, before = self.random.random(), time.monotonic(), self._log_file()
        if draw < 0.1:
            end = begun + self.random.uniform(0, startup)
            self._until(process, lambda: time.monotonic() > end)
            return "starting"
        # A run that goes on writes its log anew, up to its checkpoint.
        self._until(process, lambda: self._log_file() != before)
        first = self._step()
        self._until(process, lambda: self._step() > first)
        # On average one share of what is left for each kill; the end of the run must stay out of reach.
        goal = min(first + self.random.uniform(0, 2 * share), 0.97 * self.steps)
        if draw < 0.5:
            self._until(process, lambda: self._is_saving() or self._step() >= goal)
            pause = self.random.uniform(0, 0.1)
        else:
            self._until(process, lambda: self._step() >= goal)
            pause = self.random.uniform(0, 0.2)
        end = time.monotonic() + pause
        self._until(process, lambda: time.monotonic() > end)
        return "saving" if self._is_saving() else "training"

    def _until(self, process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
        while process.poll() is None and not condition():
            time.sleep(_POLL)

    def _is_saving(self) -> bool:
        folder = self.workdir / "checkpoints"
        return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())

    def _log_file(self) -> int:
        """Which file the log is now."""
        path = self.workdir / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def _step(self) -> int:
        """The last update that the log knows."""
        path = self.workdir / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 4096))
                lines = file.read().splitlines()
        except OSError:
            return 0
        steps = [int(line[len(_STEP) :].split(b",")[0]) for line in lines if line.startswith(_STEP) and b"," in line]
        return steps[-1] if steps else 0


_STEP = b'{"step": '


def compare_runs(one: Path, other: Path) -> list[str]:
    """Says in what two finished runs of a config differ; nothing if they are alike to the bit."""
    import jax
    import numpy as np

    from weights.checkpoint import CheckpointStore
    from weights.run import CHECKPOINTS, SAMPLES, read_metrics

    differences = []
    stores = [CheckpointStore(folder / CHECKPOINTS) for folder in (one, other)]
    if stores[0].steps() != stores[1].steps():
        return [f"checkpoints {stores[0].steps()} and {stores[1].steps()}"]
    step = stores[0].steps()[0]
    trees = [store.load(step, store.abstract(step)) for store in stores]
    for (path, leaf), second in zip(
        jax.tree_util.tree_leaves_with_path(trees[0]), jax.tree.leaves(trees[1]), strict=True
    ):
        if np.asarray(leaf).tobytes() != np.asarray(second).tobytes():
            differences.append(f"step {step}: {jax.tree_util.keystr(path, simple=True, separator='/')}")

    def rows(folder: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in row.items() if not key.startswith("time/")} for row in read_metrics(folder)
        ]

    if rows(one) != rows(other):
        differences.append("metrics.jsonl")
    pictures = [{path.name: path.read_bytes() for path in (folder / SAMPLES).iterdir()} for folder in (one, other)]
    if pictures[0] != pictures[1]:
        differences.append("samples")
    return differences


def main(arguments: Sequence[str]) -> int:
    """Parses the command line, kills and compares."""
    parser = entry_point.parser("scripts.chaos", _DESCRIPTION)
    parser.add_argument("--workdir", required=True, help="a new folder for both runs")
    parser.add_argument("--kills", type=int, default=100, help="how often (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options, rest = parser.parse_known_args(arguments)
    config = load_config(rest)
    folder = local(options.workdir, "--workdir")
    if folder.exists():
        raise UserError(f"{folder} exists; give a new --workdir")
    if options.kills < 1:
        raise UserError(f"--kills must be at least 1, not {options.kills}")
    folder.mkdir(parents=True)
    train = [sys.executable, "-m", "train", *rest]
    print(f"uninterrupted: {shlex.join([*train, f'--workdir={folder}/whole'])}", flush=True)
    with (folder / "whole.log").open("w") as log:
        if subprocess.run([*train, f"--workdir={folder}/whole"], stdout=log, stderr=log, check=False).returncode:
            raise UserError(f"the uninterrupted run failed; see {folder}/whole.log")

    chaos = Chaos(train, folder / "killed", config.steps, random.Random(check_seed("--seed", options.seed)))
    phases = chaos.run(options.kills, lambda line: print(line, flush=True))
    differences = compare_runs(folder / "whole", folder / "killed")
    ids = {path.name.rsplit("-", 1)[1] for path in (folder / "killed").glob("wandb/offline-run-*")}
    if len(ids) != (config.wandb.mode == "offline"):
        differences.append(f"W&B ids: {', '.join(sorted(ids)) or 'none'}")
    if phases.total() < options.kills:
        differences.append(f"the run was over after {spell_count(phases.total(), 'kill')}: raise config.steps")
    shown = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
    print(f"killed {spell_count(phases.total(), 'time')} ({shown}){'; one W&B id' if len(ids) == 1 else ''}")
    print("alike to the bit" if not differences else f"different: {'; '.join(differences[:8])}")
    return EXIT_FAILURE if differences else EXIT_OK


if __name__ == "__main__":
    entry_point.run(main)
