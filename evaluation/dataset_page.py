"""A prepared dataset as one page, to be looked at before anything is trained on it.

A sample of pictures with their captions, how long captions are, how large pictures are, and what was left out and why.
Whatever comes from the data is escaped.
"""

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cli.locations import Location
from cli.plurals import spell_count
from data.records import RecordSource
from data.tokenizer import Tokenizer
from evaluation.page import picture_tag, pyplot, svg_of, write_page

MEASURED = 1000  # records at most that are decoded for the histograms
SHOWN = 36  # pictures
_NAMED = 200  # things left out that are listed; all of them are in the report
_THUMBNAIL = 168  # pixels of the long side
_LENGTHS = (8, 16, 32, 48, 64, 77, 128, 256)  # of `text_length` that are tried


def write_dataset_page(
    path: Location, source: RecordSource, title: str, tokenizer: Tokenizer | None, report: Mapping[str, Any]
) -> None:
    """Writes the page.

    Args:
      path: of the HTML file.
      source: the training split.
      title: name of the dataset.
      tokenizer: that is stored with it; None where there are no captions.
      report: as `data.folder.prepare` returns it; {} for a dataset that was prepared otherwise.
    """
    places = _spread(len(source), MEASURED)
    shown = {places[index] for index in _spread(len(places), SHOWN)}
    figures, sizes, captions = [], [], []
    for place in places:
        record = source[place]
        sizes.append(record["image"].shape[:2])
        captions += record.get("captions", ())
        if place in shown:
            figures.append(_figure(record, source.class_names))
    num = f"{len(places):,} of {len(source):,} training pictures"
    parts = [
        _counts(report),
        f'<h2>Pictures</h2><p class="note">{len(figures)}, evenly spaced.</p>',
        f'<div class="curves">{"".join(figures)}</div>',
        f'<h2>Sizes</h2><p class="note">Of {num}, in pixels.</p>',
        _sizes(np.asarray(sizes)),
        _captions(captions, tokenizer, num),
        _left_out(report),
    ]
    damaged = f", {len(source.damaged)} of them cannot be read" if source.damaged else ""
    write_page(path, f"Dataset {title}", f"{spell_count(len(source), 'training picture')}{damaged}", "".join(parts))


def _spread(length: int, num: int) -> list[int]:
    """At most `num` places below `length`, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, length - 1, num).astype(int)).tolist()


def _figure(record: Mapping[str, Any], class_names: Mapping[str, Sequence[str]]) -> str:
    """One picture, small, over its captions."""
    picture = Image.fromarray(record["image"])
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    picture.save(file := io.BytesIO(), "JPEG", quality=85)
    height, width = record["image"].shape[:2]
    classes = [names[record[field]] for field, names in class_names.items() if record[field] >= 0]
    lines = [_short(caption) for caption in record.get("captions", ())[:5]]
    note = f'<span class="note">{width} x {height}{"".join(f", {html.escape(name)}" for name in classes)}</span>'
    text = "<br>".join([*lines, note])
    picture_html = picture_tag(file.getvalue(), "a picture of the dataset", "jpeg")
    return f"<figure>{picture_html}<figcaption>{text}</figcaption></figure>"


def _short(text: str) -> str:
    return html.escape(text if len(text) <= 200 else f"{text[:200]}\N{HORIZONTAL ELLIPSIS}")


def _counts(report: Mapping[str, Any]) -> str:
    if not report:
        return ""
    rows = [("source", report["request"]["source"]), ("kind", report["kind"])]
    rows += [("fields", note) for note in report["notes"]]
    rows += [(f"{split} pictures", f"{number:,}") for split, number in report["splits"].items()]
    rows += [("made smaller and encoded again", f"{report['encoded_again']:,}")] if report["encoded_again"] else []
    rows += (
        [("classes", f"{len(report['classes']):,}: {', '.join(report['classes'][:50])}")] if report["classes"] else []
    )
    rows += [("left out", f"{sum(report['skipped'].values()):,}")]
    return _table(rows)


def _table(rows: Sequence[tuple[str, ...]], head: Sequence[str] = ()) -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _sizes(sizes: np.ndarray) -> str:
    """Histograms of short sides and of aspect ratios, and the most frequent sizes."""
    height, width = sizes.T
    common, counts = np.unique(sizes, axis=0, return_counts=True)
    first = np.argsort(-counts, kind="stable")[:5]
    rows = [(f"{common[i][1]} x {common[i][0]}", f"{100 * counts[i] / len(sizes):.1f} %") for i in first]
    curves = _histogram(np.minimum(height, width), "short side") + _histogram(width / height, "width over height")
    return f'<div class="curves">{curves}</div>{_table(rows, ("most frequent", "share"))}'


def _captions(captions: Sequence[str], tokenizer: Tokenizer | None, num: str) -> str:
    """Histograms of lengths, and how many captions each `text_length` cuts."""
    if tokenizer is None or not captions:
        return '<h2>Captions</h2><p class="note">None: text models cannot learn of it.</p>'
    ids = np.asarray([tokenizer.count(caption) for caption in captions])
    letters = np.asarray([len(caption) for caption in captions])
    rows = [(str(length), f"{100 * (ids > length).mean():.1f} %") for length in _LENGTHS]
    curves = _histogram(ids, "tokens of a caption") + _histogram(letters, "characters of a caption")
    note = (
        f"{len(captions):,}, of {num}; the tokenizer has {tokenizer.vocab_size:,} ids. Framing takes two tokens more."
    )
    table = _table(rows, ("config.data.text_length", "captions that it cuts"))
    return f'<h2>Captions</h2><p class="note">{note}</p><div class="curves">{curves}</div>{table}'


def _left_out(report: Mapping[str, Any]) -> str:
    if not report.get("left_out"):
        return ""
    counts = _table([(reason, f"{count:,}") for reason, count in report["skipped"].items()], ("reason", "number"))
    rows = [(each["name"], each["reason"], each["detail"]) for each in report["left_out"]]
    more = f"The first {_NAMED}; report.json beside the records has all." if len(rows) > _NAMED else ""
    named = _table(rows[:_NAMED], ("what", "reason", "in particular"))
    return f'<h2>Left out</h2>{counts}<p class="note">{more}</p>{named}'


def _histogram(values: np.ndarray, title: str) -> str:
    figure, axes = pyplot.subplots(figsize=(4.6, 2.7), layout="constrained")
    try:
        axes.hist(values, bins=min(40, max(1, len(np.unique(values)))))
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        low, median, high, largest = np.percentile(values, (5, 50, 95, 100))
        axes.set_xlabel(f"5 % {low:.4g}, median {median:.4g}, 95 % {high:.4g}, most {largest:.4g}", fontsize=8)
        return svg_of(figure)
    finally:
        pyplot.close(figure)
