"""A whole table of benchmarks: a process for each row, whose record is saved as soon as it is there.

Rows compare with other projects' code, which tests/parity alone imports; so what measures them stands there, and is
started and not imported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.errors import UserError
from cost.result_table import check_page, is_same, read_records, save_record, write_table

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tests" / "parity" / "benchmarks" / "one_row.py"
SUITES = ("cpu", "gpu")
RESULTS, PAGE = ROOT / "docs" / "benchmarks", ROOT / "docs" / "performance.md"

Start = Callable[[Sequence[str]], Mapping[str, Any]]


def run_suite(
    suite: str,
    *,
    pattern: str = "",
    toy: bool = False,
    clock: str = "wall",
    compiled: bool = True,
    again: bool = False,
    results: Path | None = None,
    page: Path | None = None,
    say: Callable[[str], None] = print,
    start: Start | None = None,
) -> int:
    """Measures the rows of a suite that are not there yet, and shows all of them on the page.

    A row is there if the file of results has it of this commit without changes, machine, versions, clock and peers,
    without noise and with no peer that failed. So a suite that was cut short goes on where it was when it is started
    again.

    Args:
      suite: one of `SUITES`.
      pattern: of rows' names, as a regular expression; "" for all.
      toy: whether sizes are toys, for tests and rehearsals.
      clock: "wall", or "processor" for a machine with other work and one core of it.
      compiled: whether torch.compile is a peer.
      again: measures rows that are there, too.
      results: folder of the files of results; None for docs/benchmarks, and for no file at toy size.
      page: with the table; None for docs/performance.md, and for none at toy size and with results elsewhere.
      say: takes lines.
      start: runs `one_row.py` with these arguments and returns what it wrote; None for a process.

    Returns:
      0, or 1 if a row failed; it is said which.

    Raises:
      UserError: if no row matches, the rows cannot be listed, or the page has no place for the table.
    """
    start, told = start or _start, [f"--suite={suite}", f"--clock={clock}"]
    told += ["--toy"] if toy else ["--compiled"] if compiled else []
    results = results or (None if toy else RESULTS)
    page = page or (PAGE if not toy and results is not None and results.resolve() == RESULTS else None)
    if page is not None:
        check_page(page, suite)
    listed = start([*told, "--list"])
    try:
        chosen = [name for name in listed["rows"] if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--rows={pattern} is no regular expression: {error}") from error
    if not chosen:
        raise UserError(f"--rows={pattern} matches none of {', '.join(listed['rows'])}")
    file = results / f"{suite}.jsonl" if results is not None else None
    records = read_records(file) if file is not None else {}
    failed = []
    for number, name in enumerate(chosen, start=1):
        head = f"{number} of {len(chosen)}  {name}"
        if not again and name in records and is_same(records[name], {**listed["on"], "row": name}):
            say(f"{head}: there already")
            continue
        try:
            record = start([*told, f"--row={name}"])
        except UserError as error:
            failed.append(name)
            say(f"{head}: failed: {error}")
            continue
        say(f"{head}: {describe(record)}")
        records[name] = record
        if file is not None:
            save_record(file, record, listed["rows"])
            if page is not None:
                write_table(page, suite, list(read_records(file).values()))
    if failed:
        say(f"{len(failed)} of {len(chosen)} rows failed: {', '.join(failed)}")
    return 1 if failed else 0


def describe(record: Mapping[str, Any]) -> str:
    """One line of a record."""
    ours, *_ = record["sides"].values()
    ratios = ", ".join(f"{each['median']:.2f} of {label}" for label, each in record["ratios"].items())
    noise = f", noise (windows differ by {record['spread']:.1f} times)" if record["noise"] else ""
    failed = "".join(f"; {label} failed: {why}" for label, why in record["failed"].items())
    return f"{1e3 * ours['seconds']['median']:.3g} ms; {ratios or 'no peer'}{noise}{failed}"


def _start(arguments: Sequence[str]) -> Mapping[str, Any]:
    """Runs the program in a process of its own.

    Raises:
      UserError: if it fails, with the last line that it said.
    """
    if not PROGRAM.is_file():
        raise UserError(f"the suites are a part of the checkout, and {PROGRAM} is missing")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(PROGRAM), *arguments, f"--out={out}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if process.returncode or not out.is_file():
            lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
            raise UserError(lines[-1] if lines else f"it ended with {process.returncode}")
        return json.loads(out.read_text(encoding="utf-8"))
