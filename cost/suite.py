"""A whole table of benchmarks: a process for each row, whose record is saved as soon as it is there.

Rows compare with other projects' code, which tests/parity alone imports; so what measures them stands there, and is
started and not imported. The suite of a GPU has other parts too (`cost.suite_parts`).
"""

import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.errors import UserError
from cli.plurals import spell_count
from cost.commands import ROOT, OutOfTime, read_json, run_command
from cost.result_table import check_page, describe_part, is_same, key_of, read_records, save_record, write_table
from cost.suite_parts import GPU_PARTS, Part

PROGRAM = ROOT / "tests" / "parity" / "benchmarks" / "one_row.py"
SUITES = ("cpu", "gpu")
RESULTS, PAGE = ROOT / "docs" / "benchmarks", ROOT / "docs" / "performance.md"

Start = Callable[[Sequence[str], float | None], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Turn:
    """Something that a suite measures: a row, with or without torch.compile, or another part."""

    name: str
    compiled: bool
    seconds: float  # that it takes, by a guess


def run_suite(
    suite: str,
    *,
    pattern: str = "",
    toy: bool = False,
    clock: str = "wall",
    compiled: bool = True,
    again: bool = False,
    minutes: float = 0.0,
    results: Path | None = None,
    page: Path | None = None,
    say: Callable[[str], None] = print,
    start: Start | None = None,
    parts: Sequence[Part] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Measures the rows of a suite that are not there yet, and shows all of them on the page.

    A row is there if the file of results has it of this commit without changes, machine, versions, clock and peers,
    without noise and with no peer that failed. So a suite that was cut short goes on where it was when it is started
    again.

    With `minutes`, what would not be done by then is left out, in the order of the list, which is that of importance;
    what is under way when they are over is stopped. torch.compile, which takes the longest, then waits until all rows
    were measured without it.

    Args:
      suite: one of `SUITES`.
      pattern: of rows' names, as a regular expression; "" for all.
      toy: whether sizes are toys, for tests and rehearsals.
      clock: "wall", or "processor" for a machine with other work and one core of it.
      compiled: whether torch.compile is a peer.
      again: measures rows that are there, too.
      minutes: that there are; 0 for as many as it takes.
      results: folder of the files of results; None for docs/benchmarks, and for no file at toy size.
      page: with the table; None for docs/performance.md, and for none at toy size and with results elsewhere.
      say: takes lines.
      start: runs `one_row.py` with these arguments, for so many seconds at most, and returns what it wrote; None for a
        process.
      parts: what the suite has beside rows; None for those of a GPU's suite, and for none of the CPU's.
      now: seconds.

    Returns:
      0, or 1 if a row failed; it is said which.

    Raises:
      UserError: if no row matches, the rows cannot be listed, or the page has no place for the table.
    """
    end = now() + 60 * minutes if minutes else None
    start, told = start or _start, [f"--suite={suite}", f"--clock={clock}", *(["--toy"] if toy else [])]
    by_name = {part.name: part for part in (parts if parts is not None else GPU_PARTS if suite == "gpu" else ())}
    results = results or (None if toy else RESULTS)
    page = page or (PAGE if not toy and results is not None and results.resolve() == RESULTS else None)
    if page is not None:
        check_page(page, suite)
    listed = start([*told, "--list"], None)
    order = _in_order(listed["rows"], by_name)
    turns = _turns(_matching(order, pattern), listed.get("plan", {}), by_name, compiled and not toy, bool(minutes))
    file = results / f"{suite}.jsonl" if results is not None else None
    records = read_records(file) if file is not None else {}
    failed: list[str] = []
    late: list[str] = []
    for number, turn in enumerate(turns, start=1):
        head = f"{number} of {len(turns)}  {turn.name}" + (", torch.compile too" if turn.compiled and minutes else "")
        on = {**listed["on"], "row": turn.name, "compiled": turn.compiled}
        if not again and key_of(on) in records and _is_there(records[key_of(on)], on):
            say(f"{head}: there already")
            continue
        left = None if end is None else end - now()
        guess = 0.0 if toy else turn.seconds
        if left is not None and left < max(guess, 1.0):
            late.append(head)
            say(f"{head}: left out: it takes about {guess:.0f} s, and {max(0.0, left):.0f} are left")
            continue
        begun = now()
        try:
            if turn.name in by_name:
                record = {**on, "what": by_name[turn.name].what, **by_name[turn.name].run(toy, left)}
            else:
                flags = [f"--row={turn.name}", *(["--compiled"] if turn.compiled else [])]
                record = dict(start([*told, *flags], left))
        except OutOfTime as error:
            late.append(head)
            say(f"{head}: {error}")
            continue
        except UserError as error:
            failed.append(turn.name)
            say(f"{head}: failed: {error}")
            continue
        record["took"] = now() - begun
        say(f"{head}: {describe(record)}")
        if "sides" not in record and record["failed"]:
            failed.append(turn.name)
        records[key_of(on)] = record
        if file is not None:
            save_record(file, record, order)
            if page is not None:
                write_table(page, suite, list(read_records(file).values()))
    if late:
        say(f"{len(late)} of {len(turns)} left out for lack of time; the same command goes on with them")
    if failed:
        say(f"{len(failed)} of {spell_count(len(turns), 'row')} failed: {', '.join(failed)}")
    return 1 if failed else 0


def describe(record: Mapping[str, Any]) -> str:
    """One line of a record."""
    if "sides" not in record:
        return describe_part(record)
    ours, *_ = record["sides"].values()
    ratios = ", ".join(f"{each['median']:.2f} of {label}" for label, each in record["ratios"].items())
    noise = f", noise (windows differ by {record['spread']:.1f} times)" if record["noise"] else ""
    failed = "".join(f"; {label} failed: {why}" for label, why in record["failed"].items())
    kernels = f", {' and '.join(ours['attention'])} attention" if "attention" in ours else ""
    return f"{1e3 * ours['seconds']['median']:.3g} ms{kernels}; {ratios or 'no peer'}{noise}{failed}"


def _in_order(rows: Sequence[str], parts: Mapping[str, Part]) -> list[str]:
    """Names of rows and parts, each part behind the row that it says, or before all."""
    order = [part.name for part in parts.values() if not part.behind]
    for row in rows:
        order += [row, *(part.name for part in parts.values() if part.behind == row)]
    return order


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    """Those in which the pattern is found. Raises UserError if it is in none."""
    try:
        chosen = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--rows={pattern} is no regular expression: {error}") from error
    if not chosen:
        raise UserError(f"--rows={pattern} matches none of {', '.join(names)}")
    return chosen


def _turns(
    names: Sequence[str], plan: Mapping[str, Any], parts: Mapping[str, Part], compiled: bool, short: bool
) -> list[_Turn]:
    """What is measured, in order; where time is short, torch.compile comes behind all else."""

    def turn(name: str, compiled: bool) -> _Turn:
        seconds = parts[name].seconds if name in parts else plan.get(name, {}).get("seconds", 0.0)
        return _Turn(name, compiled, seconds * (2 if compiled else 1))

    may = {name: compiled and name not in parts and plan.get(name, {}).get("compiles", True) for name in names}
    if not short:
        return [turn(name, may[name]) for name in names]
    return [turn(name, False) for name in names] + [turn(name, True) for name in names if may[name]]


def _is_there(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether nothing is to be measured; a record with torch.compile says all that one without it does."""
    return is_same(kept, wanted) or is_same(kept, {**wanted, "compiled": True})


def _start(arguments: Sequence[str], seconds: float | None) -> Mapping[str, Any]:
    """Runs the program in a process of its own.

    Raises:
      UserError: if it fails, with the last line that it said, or takes longer.
    """
    if not PROGRAM.is_file():
        raise UserError(f"the suites are a part of the checkout, and {PROGRAM} is missing")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(PROGRAM), *arguments, f"--out={out}"]
        run_command(command, seconds, {"PYTHONWARNINGS": "ignore"})
        return read_json(out)
