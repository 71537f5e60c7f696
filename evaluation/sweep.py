"""Metrics over a grid of sampling settings and weights: published numbers are of one such cell, often not named."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cli.errors import UserError
from evaluation.applicable_metrics import chosen_metrics
from evaluation.evaluate import check_mode, drawn_metrics, evaluate_run, idle_in
from evaluation.records import Record, heading, write_records
from evaluation.tools import Tools, check_tools
from sample.arguments import average_of
from sample.sheets.axes import Axis, spell
from sample.trained import TrainedSampler, refuse_idle

# Axes that choose weights; all others are overrides of `config.sample`, but the seed.
_WEIGHTS = ("step", "ema")


def evaluate_cells(
    trained: TrainedSampler,
    open_run: Callable[[bool | float, int | None], TrainedSampler],
    axes: Sequence[Axis],
    metrics: Sequence[str],
    splits: Sequence[str],
    num: int,
    seed: int,
    settings: Mapping[str, Any],
    tools: Tools,
    done: list[Record],
) -> None:
    """Evaluates every combination of the axes' values, and writes each record as soon as there is one.

    Args:
      trained: the run with the weights that no axis changes.
      open_run: (ema, step) -> the run with other weights.
      axes: what differs between cells; none for one cell.
      metrics: see `evaluate_run`, as what follows.
      splits: see there.
      num: see there.
      seed: see there; of cells without one of their own.
      settings: see there; of all cells.
      tools: see there.
      done: records are added to it.

    Raises:
      UserError: if a cell is impossible, before any is computed; or after all were tried, if some failed.
    """
    values = {axis.name: axis.values for axis in axes}
    trained.check_settings(settings, {k: v for k, v in values.items() if k not in (*_WEIGHTS, "seed")}, besides=False)
    for name in values:
        if name not in (*trained.config.sample, *_WEIGHTS, "seed"):
            has = ", ".join((*trained.config.sample, *_WEIGHTS, "seed"))
            raise UserError(f"--sweep {name}: {trained.run.folder} has no such setting; it has {has}")
    # The weights vary slowest, so that each are read once.
    names = sorted(values, key=lambda name: name not in _WEIGHTS)
    cells = [dict(zip(names, cell, strict=True)) for cell in itertools.product(*(values[name] for name in names))]
    computed = chosen_metrics(trained, metrics, splits[0], tools.clip)
    drawings: list[dict[str, Any]] = []
    for cell in cells:
        own = {name: value for name, value in cell.items() if name not in (*_WEIGHTS, "seed")}
        try:
            trained.run.check_average(cell.get("ema", 0.0), cell.get("step", trained.weights.step))
            drawings.append(check_mode(trained, computed, {**settings, **own}))
            trained.check_request(drawings[-1])
        except UserError as error:
            raise UserError(f"{_title(cell)}: {error}" if len(cells) > 1 else str(error)) from None
    check_tools(trained, computed, drawn_metrics(computed), tools)
    refuse_idle(idle_in(trained, computed, drawings), *drawings)
    failed: list[str] = []
    opened, weights = trained, {}
    for number, cell in enumerate(cells):
        own = {name: value for name, value in cell.items() if name not in (*_WEIGHTS, "seed")}
        title = _title(cell)

        def keep(record: Record, title: str = title, number: int = number) -> None:
            write_records(trained.run, [record])
            done.append(record)
            if title:
                found = ", ".join(f"{name} {value:.5g}" for name, value in record["values"].items())
                place = f"cell {number + 1} of {len(cells)}: {title}"
                print(f"{place}: {heading(record['metric'], record['split'])}: {found}", flush=True)

        try:
            chosen = {name: cell[name] for name in _WEIGHTS if name in cell}
            if chosen != weights:
                ema = average_of(chosen["ema"]) if "ema" in chosen else trained.weights.ema
                opened, weights = open_run(ema, chosen.get("step", trained.weights.step or None)), chosen
            drawing = (cell.get("seed", seed), {**settings, **own})
            evaluate_run(opened, metrics, splits, num, *drawing, tools, keep, checked=True)
        except UserError as error:
            if len(cells) == 1:
                raise
            failed.append(f"{title}: {error}")
    if failed:
        raise UserError("; ".join(failed))


def _title(cell: Mapping[str, Any]) -> str:
    """What stands before a cell's numbers, "guidance=3, ema=0"; "" for the only one."""
    return ", ".join(f"{name}={spell(value)}" for name, value in cell.items())
