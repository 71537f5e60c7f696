"""Run folders as one self-contained HTML page: pictures, curves, scores."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cli.locations import Location
from evaluation.page import picture_tag, pyplot, svg_of, write_page
from evaluation.records import FOUND, is_share, read_records
from sample.samplers import create_sampler
from weights.run import DONE, SAMPLES, Run, read_metrics


@dataclasses.dataclass(frozen=True)
class Section:
    """What the report shows of one run.

    Attributes:
      title: heading.
      text: a paragraph under it.
      folder: the run folder; it may not exist yet.
      curves: {title: metric}; each is drawn with its `validation/` counterpart.
      pictures: {title: glob under samples/}; the newest match is shown.
    """

    title: str
    text: str
    folder: Location
    curves: Mapping[str, str]
    pictures: Mapping[str, str]


def write_report(
    path: Location, title: str, status: str, sections: Sequence[Section], closing: str = "", refresh: int = 0
) -> None:
    """Writes the page, whole or not at all.

    Args:
      path: of the HTML file.
      title: heading.
      status: one line under it.
      sections: one for each run.
      closing: HTML at the end.
      refresh: seconds after which a browser loads it again; 0 for a finished report.
    """
    write_page(path, title, status, "".join(_section(section) for section in sections) + closing, refresh)


def _section(section: Section) -> str:
    rows = read_metrics(section.folder)
    parts = [f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"]
    if not rows:
        return "".join([*parts, '<p class="note">Not started.</p>'])
    step = rows[-1]["step"]
    state = "finished" if (section.folder / DONE).is_file() else "training"
    parts.append(f'<p class="note">{state}, step {step:,}</p>')
    parts.append(_scores(section.folder))
    for title, pattern in section.pictures.items():
        found = sorted((section.folder / SAMPLES).glob(pattern))
        if found:
            parts.append(f"<h3>{html.escape(title)}</h3>{picture_tag(found[-1].read_bytes(), title)}")
    curves = [_curve(rows, heading, metric) for heading, metric in section.curves.items()]
    parts.append(f'<div class="curves">{"".join(curves)}</div>')
    return "".join(parts)


def headline_records(folder: Location) -> list[dict[str, Any]]:
    """The newest record of each metric and split that is of the run's own dataset and sampling settings."""
    records = read_records(folder)
    if not records:
        return []
    config = Run.open(folder).config
    # The config's own value of a setting may stand for another, as -1 does for the kind of data; records have that one.
    settings, dataset = create_sampler(config).settings, config.data.dataset
    newest = {
        (record["metric"], record["split"]): record
        for record in records
        if all(record.get(key, value) == value for key, value in settings.items())
        and record.get("dataset", dataset).startswith(dataset)
    }
    return list(newest.values())


def _scores(folder: Location) -> str:
    """The tables of evaluation.json, one for each metric."""
    records = headline_records(folder)
    metrics = dict.fromkeys(record["metric"] for record in records)
    return "".join(_score_table([record for record in records if record["metric"] == name]) for name in metrics)


def _score_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The table of one metric: a column for each split."""
    newest = {record["split"]: record for record in records}
    names = list(dict.fromkeys(name for record in newest.values() for name in record["values"]))
    head = "".join(f"<th>{html.escape(split or '')} (N = {record['num']})</th>" for split, record in newest.items())
    lines = []
    for name in names:
        cells = "".join(f'<td class="number">{_number(record, name)}</td>' for record in newest.values())
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    hidden = ("metric", "split", "num", *FOUND)
    settings = ", ".join(f"{key} {value}" for key, value in records[-1].items() if key not in hidden)
    return f'<table><tr><th></th>{head}</tr>{"".join(lines)}</table><p class="note">{html.escape(settings)}</p>'


def _number(record: Mapping[str, Any], name: str) -> str:
    value = record["values"].get(name)
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if is_share(record, name) else f"{value:.4g}"


def _curve(rows: Sequence[Mapping[str, Any]], title: str, metric: str) -> str:
    """One metric over steps, as inline SVG."""
    figure, axes = pyplot.subplots(figsize=(4.6, 2.7), layout="constrained")
    try:
        for name, style in (
            (metric, {"linewidth": 1.2, "label": "training"}),
            (f"validation/{metric}", {"marker": "o", "markersize": 3, "label": "validation"}),
        ):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
        values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.ones(1)])
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        return svg_of(figure)
    finally:
        pyplot.close(figure)
