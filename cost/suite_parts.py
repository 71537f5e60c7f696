"""What the suite of a GPU has beside rows: the tests that need an accelerator, and a training that is graded.

Both are commands that anybody may give; here they get a limit in seconds, and leave a record.
"""

import contextlib
import dataclasses
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cli.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from cost.commands import ROOT, OutOfTime, read_json, run_command

TESTS = "tests/test_accelerator.py"
_TRAINING_SECONDS = 300.0  # of both stages together
_TOY_SECONDS = 3600.0  # the same of a rehearsal, on whatever machine
_SAVING_SECONDS = 60.0  # for a training that is stopped, which ends the update or the compilation that is under way
_GRADING_SECONDS = 90.0  # for which a training leaves time where there is a limit

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that a suite does beside rows.

    Attributes:
      name: as that of a row.
      what: says in the table what it is.
      behind: the row behind which it comes; "" for before all.
      seconds: about what it takes on one H100: a guess.
      run: (whether sizes are toys, seconds that it may take or None) -> `result` in words, `figures`, {what failed:
        why}, and what makes it a record. Raises UserError if it found nothing.
    """

    name: str
    what: str
    behind: str
    seconds: float
    run: Callable[[bool, float | None], Result]


def run_tests(toy: bool, seconds: float | None) -> Result:
    """The tests of the marker `accelerator`; at toy size the CPU takes the accelerator's place."""
    workers = min(4, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // 4)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "accelerator", TESTS, f"--junitxml={report}"]
        # Libraries warn of what a machine has or lacks; that fails tests elsewhere, and says nothing here.
        command += ["-W", "default", "-p", "no:cacheprovider", "-n", str(workers)]
        environment = {"TESSERA_TESTS_ACCELERATOR": "rehearsal" if toy else "1"}
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # workers share a GPU
        run_command(command, seconds, environment, codes=(0, 1))
        if not report.is_file():
            raise UserError("pytest wrote no report; `pip install -e '.[dev]'` has what it needs")
        return read_report(report.read_text(encoding="utf-8"))


def read_report(report: str) -> Result:
    """The result of a report of pytest's in JUnit's form."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failed = {
        case.get("name", ""): " ".join(found.get("message", "").split())[:200]
        for case in cases
        for found in case
        if found.tag in ("failure", "error")
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    figures = {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}
    if not figures["passed"] and not failed:
        failed = {"tests": "none ran"}
    return _result(", ".join(f"{count} {name}" for name, count in figures.items() if count), figures, failed)


def run_scenes(toy: bool, seconds: float | None) -> Result:
    """The dataset, `configs/scenes/autoencoder.py`, `latent_unet.py` in its latents, and the grades of its pictures.

    Training has five minutes for both stages, or less where there is less time; a stage that does not come to its end
    by then saves, and what it has is used. Runs stay in a new folder under `runs`, those of toy size nowhere.
    """
    with contextlib.ExitStack() as stack:
        if toy:
            return _train_and_grade(Path(stack.enter_context(tempfile.TemporaryDirectory())), toy, seconds)
        (ROOT / "runs").mkdir(exist_ok=True)
        return _train_and_grade(Path(tempfile.mkdtemp(prefix="gpu_suite_", dir=ROOT / "runs")), toy, seconds)


def _train_and_grade(runs: Path, toy: bool, seconds: float | None) -> Result:
    from weights.checkpoint import CheckpointStore  # imports jax
    from weights.run import CHECKPOINTS, CONFIG, EVALUATION

    begun, variant = time.monotonic(), ":debug" if toy else ""

    def left(reserve: float = 0.0) -> float | None:
        return None if seconds is None else seconds - reserve - (time.monotonic() - begun)

    def start(*arguments: str, limit: float | None, patience: float = 0.0, codes: tuple[int, ...] = (EXIT_OK,)) -> None:
        run_command([sys.executable, "-m", *arguments], limit, patience=patience, codes=codes)

    start("scripts.prepare", "--dataset=scenes/single32", limit=left())
    there_is = left(reserve=_GRADING_SECONDS)
    budget = _TOY_SECONDS if toy else _TRAINING_SECONDS
    budget = budget if there_is is None else min(budget, there_is)
    stages: dict[str, Any] = {}
    source = f"--config.frozen.first_stage.source={runs / 'autoencoder'}"
    for name, flags in (("autoencoder", ()), ("latent_unet", (source,))):
        limit = budget - sum(stage["seconds"] for stage in stages.values())
        if limit < 1:
            raise OutOfTime(f"no time was left to train {name}")
        since, workdir = time.monotonic(), runs / name
        command = ("train", f"--config=configs/scenes/{name}.py{variant}", f"--workdir={workdir}", *flags)
        start(*command, limit=limit, patience=_SAVING_SECONDS, codes=(EXIT_OK, EXIT_PREEMPTED))
        steps = CheckpointStore(workdir / CHECKPOINTS).steps()
        if not steps:
            raise OutOfTime(f"{name} saved nothing in {limit:.0f} s")
        wanted = read_json(workdir / CONFIG)["steps"]
        stages[name] = {"updates": steps[0], "of": wanted, "seconds": time.monotonic() - since}
    num, run = 8 if toy else 500, runs / "latent_unet"
    start("evaluation", f"--run={run}", "--metrics=caption_accuracy", f"--num={num}", limit=left())
    return scenes_found(stages, read_json(run / EVALUATION), num, runs.name)


def scenes_found(stages: Mapping[str, Any], records: Sequence[Mapping[str, Any]], num: int, runs: str) -> Result:
    """The result of a training and its grades."""
    right = {record["split"]: record["values"]["all"] for record in records if record["metric"] == "caption_accuracy"}
    trained = ", ".join(
        f"{name} {stage['updates']} of {stage['of']} updates in {stage['seconds']:.0f} s"
        for name, stage in stages.items()
    )
    grades = ", ".join(f"{split} {share:.1%}" for split, share in right.items())
    result = f"{trained}; captions of which all is right, of {num}: {grades}"
    return _result(result, {"stages": dict(stages), "caption_accuracy": right, "num": num, "runs": runs}, {})


def _result(words: str, figures: Mapping[str, Any], failed: Mapping[str, str]) -> Result:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"result": words, "figures": dict(figures), "failed": dict(failed), "noise": False, "date": date}


GPU_PARTS = (
    Part("accelerator_tests", f"`{TESTS}`", "", 120.0, run_tests),
    Part(
        "scenes_run",
        "`configs/scenes/autoencoder.py`, and `latent_unet.py` in its latents, five minutes at most, graded",
        "sd_sampling",
        180.0,
        run_scenes,
    ),
)
