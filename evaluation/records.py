"""Results at rest: `evaluation.json`, the same for a terminal, and where pictures that evaluation draws lie."""

import json
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from cli.errors import UserError
from cli.locations import Location, make_folder, write_whole
from cli.text_files import read_text
from data.pictures import save_picture
from sample.trained import TrainedSampler
from weights.run import EVALUATION, SAMPLES, Run

Record = dict[str, Any]

# What a record found; all else is what it was computed with.
FOUND = ("values", "counted", "strength", "standard_errors")


def is_share(record: Record, name: str) -> bool:
    """Whether a value of a record is a share of what is counted, shown as a percentage, rather than an error."""
    return name in record.get("counted", {})


def heading(metric: str, split: str | None) -> str:
    """What stands above a metric's values; one that is of no split has None."""
    return f"{metric} on {split}" if split else metric


def read_records(folder: Location) -> list[Record]:
    """Reads `evaluation.json` of a run folder; [] if there is none. A number that is not finite is None.

    Raises:
      UserError: if it is something else.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return []
    try:
        records = json.loads(read_text(path), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); move it away and evaluate again") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} is no list of records; move it away and evaluate again")
    return records


def check_finite(record: Record) -> Record:
    """Returns what a metric found.

    Raises:
      UserError: if a value is not finite: it measures nothing, and JSON cannot hold it.
    """
    for name, value in record["values"].items():
        if not math.isfinite(value):
            raise UserError(f"{name} is not finite ({value}); the weights, or what they made, are damaged")
    return record


def write_records(run: Run, records: Sequence[Record]) -> None:
    """Adds records to `evaluation.json`; one with the same metric, split and settings is replaced.

    Raises:
      UserError: if the file is something else.
    """
    path = run.folder / EVALUATION
    earlier = read_records(run.folder)

    def identity(record: Record) -> str:
        return json.dumps({key: value for key, value in record.items() if key not in FOUND}, sort_keys=True)

    new = {identity(record) for record in records}
    kept = [record for record in earlier if identity(record) not in new]
    write_whole(path, json.dumps([*kept, *records], indent=2, allow_nan=False) + "\n")


def keep_picture(trained: TrainedSampler, stem: str, picture: Image.Image) -> None:
    """Writes a picture that evaluation draws: among the run's samples, named after the dataset if it is another."""
    folder, dataset = trained.run.folder / SAMPLES, trained.config.data.dataset
    make_folder(folder)
    own = dataset == trained.run.config.data.dataset
    save_picture(folder / (f"{stem}.png" if own else f"{dataset.replace('/', '_')}_{stem}.png"), picture)


def format_table(records: Sequence[Record]) -> str:
    """Lays records out for a terminal, shares with their standard error."""
    lines = []
    for record in records:
        settings = {k: v for k, v in record.items() if k not in ("metric", "split", *FOUND)}
        lines.append(f"{heading(record['metric'], record['split'])} ({json.dumps(settings)})")
        for name, value in record["values"].items():
            if is_share(record, name):
                binomial = math.sqrt(max(value * (1 - value), 0) / record["counted"][name])
                error = record.get("standard_errors", {}).get(name, binomial)
                lines.append(f"  {name:<28} {100 * value:6.1f} %  +- {100 * error:.1f}")
            else:
                lines.append(f"  {name:<28} {value:10.5g}")
    return "\n".join(lines)
