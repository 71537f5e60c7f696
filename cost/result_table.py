"""Rows of a benchmark: kept in a file as each is measured, and shown as a table between two marks of a page."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.errors import UserError

Record = Mapping[str, Any]

# What makes a row another measurement: none of it may differ where a suite goes on.
_SAME = ("row", "toy", "clock", "compiled", "commit", "dirty", "machine", "versions")

# Columns of a table whose rows have such a figure: heading, unit, format.
_SOMETIMES = {
    "mfu": ("MFU", 1.0, ".1%"),
    "memory_rate_share": ("of the memory's rate", 1.0, ".1%"),
    "memory_bytes": ("peak memory, MiB", 2**-20, ",.0f"),
    "compile_seconds": ("compilation, s", 1.0, ".0f"),
}


def key_of(record: Record) -> tuple[str, str]:
    """The row and the machine of a record, of which a file has one of each."""
    return record["row"], json.dumps(record["machine"], sort_keys=True)


def read_records(path: Path) -> dict[tuple[str, str], Record]:
    """The newest record of each row on each machine, by `key_of`, in the order of the file; {} without a file.

    A line that was cut short, as when the machine went away, is passed over: its row is measured again.
    """
    records: dict[tuple[str, str], Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[key_of(record)] = record
    return records


def save_record(path: Path, record: Record, order: Sequence[str]) -> None:
    """Adds a record to the file, or replaces that of its row and machine; rows are in this order, others behind.

    The file is whole at any time: a suite that is cut short keeps what it has.
    """
    records = {**read_records(path), key_of(record): record}
    places = {name: place for place, name in enumerate(order)}
    rows = sorted(records.values(), key=lambda each: places.get(each["row"], len(places)))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def is_same(kept: Record, wanted: Record) -> bool:
    """Whether a suite that goes on keeps a record: same row, commit, machine, versions, clock and peers, and sound.

    Noise, code with changes, which nobody knows again, and peers that failed are measured again.
    """
    sound = not kept["noise"] and not kept["dirty"] and not kept["failed"]
    return sound and all(kept.get(key) == wanted.get(key) for key in _SAME)


def check_page(page: Path, suite: str) -> None:
    """Raises UserError if the page has no place for the table of a suite."""
    text = page.read_text(encoding="utf-8")
    start, end = _marks(suite)
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise UserError(f"{page} has no place for the table: a line {start} and behind it {end}, each once")


def write_table(page: Path, suite: str, records: Sequence[Record]) -> None:
    """Replaces what stands between `<!-- benchmark:SUITE -->` and `<!-- end of benchmark:SUITE -->`.

    Raises:
      UserError: if the page has no such marks.
    """
    check_page(page, suite)
    text = page.read_text(encoding="utf-8")
    start, end = _marks(suite)
    pattern = re.compile(f"{re.escape(start)}.*{re.escape(end)}", re.DOTALL)
    table = f"{start}\n{format_table(records)}\n{end}"
    page.write_text(pattern.sub(lambda _: table, text), encoding="utf-8")


def format_table(records: Sequence[Record]) -> str:
    """A table in Markdown, one line for each row and peer, what was not a row, and below it what all ran on."""
    rows = [record for record in records if "sides" in record]
    shown = {key: column for key, column in _SOMETIMES.items() if _any_side(rows, key)}
    head = ["row", "this project, ms", "peer", "peer, ms", "ratio", "GFLOP/s"]
    head += [*(column for column, *_ in shown.values()), "load", "on"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"] if rows else []
    places: list[str] = []
    others: list[str] = []
    for record in records:
        where = describe_machine(record)
        places += [where] if where not in places else []
        if "sides" not in record:
            others += [f"- {record['what']}: {describe_part(record)} ({_letter(places.index(where))})."]
            continue
        (_, own), *peers = record["sides"].items()
        peers += [(label, {}) for label in record["failed"]]
        for number, (label, peer) in enumerate(peers or [("", {})]):
            cells = [record["what"] if not number else "", _milliseconds(own) if not number else ""]
            cells += [label, _failure(record, label) or _milliseconds(peer), _ratio(record, label)]
            cells.append(_both(own, peer, "flops_per_second", 1e-9, ".0f"))
            cells += [_both(own, peer, key, unit, form) for key, (_, unit, form) in shown.items()]
            load = " to ".join(f"{each:.1f}" for each in record["load_average"])
            lines.append(f"| {' | '.join([*cells, load, _letter(places.index(where))])} |")
    noted = [f"{_letter(place)}: {where}." for place, where in enumerate(places)]
    listed = ["", *others] if others else []
    return "\n".join([*lines, *listed, "", *noted])


def describe_part(record: Record) -> str:
    """What a part of a suite found that is no row, what failed in it, and how long it took."""
    failed = "".join(f"; {name} failed: {why}" for name, why in record["failed"].items())
    return f"{record['result']}{failed}; {record['took']:.0f} s"


def describe_machine(record: Record) -> str:
    """Hardware, versions, commit, clock and day of a record."""
    machine, versions = record["machine"], ", ".join(f"{name} {each}" for name, each in record["versions"].items())
    commit = f"commit {(record['commit'] or 'unknown')[:9]}" + (" with changes" if record["dirty"] else "")
    clock = {"wall": "by the clock", "processor": "processor seconds"}[record["clock"]]
    toy = "toy sizes; " if record["toy"] else ""
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return f"{toy}{machine['device']}, {cores}; {clock}; {versions}; {commit}; {record['date']}"


def _marks(suite: str) -> tuple[str, str]:
    return f"<!-- benchmark:{suite} -->", f"<!-- end of benchmark:{suite} -->"


def _failure(record: Record, label: str) -> str:
    """Why a peer did not run, as a cell may say it."""
    return f"failed: {record['failed'][label]}".replace("|", "\\|") if label in record["failed"] else ""


def _letter(place: int) -> str:
    return chr(ord("a") + place) if place < 26 else str(place)


def _any_side(records: Sequence[Record], key: str) -> bool:
    return any(key in side for record in records for side in record["sides"].values())


def _milliseconds(side: Mapping[str, Any]) -> str:
    if not side:
        return ""
    median, low, high = (f"{1e3 * side['seconds'][key]:,.3g}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _ratio(record: Record, label: str) -> str:
    if label not in record["ratios"]:
        return ""
    median, low, high = (f"{record['ratios'][label][key]:.2f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})" + (", noise" if record["noise"] else "")


def _both(own: Mapping[str, Any], peer: Mapping[str, Any], key: str, unit: float, form: str) -> str:
    """The figure of both sides, or of the one that has it."""
    return ", ".join(format(side[key] * unit, form) for side in (own, peer) if key in side)
