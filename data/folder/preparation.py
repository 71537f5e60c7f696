"""From a source of pictures to a dataset: examine all portions, decide what is kept and where, write all portions.

A portion is read by one process and written to shards of its own, so the same bytes come out for any number of
processes. What is finished lies in a folder beside the dataset, each file whole or absent, and is not done again after
a kill; the dataset gets its name when all of it is there.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import tensorflow_datasets as tfds

from cli.errors import UserError
from cli.locations import Location
from data.folder.examination import (
    ExaminePortion,
    PictureSettings,
    RecordFields,
    SourceChanged,
    WritePortion,
    read_journal,
)
from data.folder.items import Listing, is_number, shown
from data.folder.tables import Fields
from data.folder.workers import Workers
from data.picture_sizes import sizes_file, store_sizes
from data.storage import whole_file

DATASET = "folder"
VERSION = "1.0.0"
NOTES = 3  # which form of journals, and of what is kept of a portion that is written
REPORT = "report.json"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for; it decides every byte of the dataset, together with the source.

    Attributes:
      name: of the dataset, `folder/<name>`.
      source: as it was written.
      fields: where pictures, captions and classes are.
      validation: share of pictures below 1, or number of pictures, that make the validation split.
      pictures: what is done to them.
    """

    name: str
    source: str
    fields: Fields = Fields()
    validation: int | float = 0.05
    pictures: PictureSettings = PictureSettings()


def prepare(request: Request, listing: Listing, data_dir: Path, workers: int = 1) -> dict[str, Any]:
    """Prepares `folder/<name>` under `data_dir`, or leaves it as it is where the same was prepared before.

    Args:
      request: what is asked for.
      listing: of its source.
      data_dir: where datasets are kept.
      workers: processes; 1 for this one alone.

    Returns:
      The report, as it is stored beside the records.

    Raises:
      UserError: if there is another dataset of that name, another process makes it, or no picture is left to be kept.
    """
    final = data_dir / DATASET / request.name / VERSION
    work = data_dir / DATASET / f".{request.name}"
    if final.exists():
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed after its last step but one
        return prepared_before(final, request, listing)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(work / "lock", timeout=0):
            if final.exists():  # another process has just finished, and may have been asked for something else
                report = prepared_before(final, request, listing)
            else:
                _prepare_in(_unfinished(work, request, listing), final, request, listing, workers)
                report = read_report(final)
    except filelock.Timeout as error:
        raise UserError(
            f"another process prepares {DATASET}/{request.name}; wait for it, or give another --name"
        ) from error
    shutil.rmtree(work, ignore_errors=True)
    return report


def read_report(folder: Location) -> dict[str, Any]:
    """The report of a dataset's folder; {} for one that was not prepared here."""
    path = folder / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def prepared_before(final: Location, request: Request, listing: Listing) -> dict[str, Any]:
    """The report of a dataset that is there.

    Raises:
      UserError: if it was made of another source, or otherwise.
    """
    report = read_report(final)
    before = report.get("request", {})
    flags = _differing_flags(_decisive(request), before)
    differing = ""
    if flags:
        differing = f"with another {', '.join(flags)}"
    elif report.get("fingerprint") != listing.fingerprint:
        differing = f"from {before.get('source', 'another source')} with another content"
    if differing:
        raise UserError(
            f"{DATASET}/{request.name} was prepared {differing}; give another --name, or remove {final.parent} to "
            "prepare it anew"
        )
    return report


def _differing_flags(asked: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The flags of `scripts.prepare` in which two requests differ."""
    flags = [f"--{key}" for key in ("name", "validation") if asked[key] != before.get(key)]
    for group, suffix in (("fields", "_field"), ("pictures", "")):
        known = before.get(group, {})
        flags += [f"--{key}{suffix}" for key, value in asked[group].items() if value != known.get(key)]
    return flags


def _decisive(request: Request) -> dict[str, Any]:
    """What of a request decides the bytes; its source does so by the fingerprint, however it is written."""
    asked = dataclasses.asdict(request)
    del asked["source"]
    return asked


def _unfinished(work: Path, request: Request, listing: Listing) -> Path:
    """The folder of what is finished of this very plan; what another plan left is removed.

    It is named after the plan: a process that outlives the one that started it, for a moment, writes nowhere else.
    """
    plan = json.dumps([VERSION, NOTES, _decisive(request), listing.fingerprint, len(listing.portions)])
    folder = work / hashlib.blake2b(plan.encode(), digest_size=8).hexdigest()
    for other in work.iterdir():
        if other.is_dir() and other != folder:
            shutil.rmtree(other, ignore_errors=True)
    for name in ("examined", "written", VERSION):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for draft in (folder / name).glob("*.draft"):
            draft.unlink(missing_ok=True)
    return folder


def _prepare_in(work: Path, final: Path, request: Request, listing: Listing, workers: int) -> None:
    try:
        with Workers(workers) as pool:
            _run(work, request, listing, pool)
    except SourceChanged:
        # What was decided of the other portions holds no more. It is moved first: workers may still be writing there.
        outdated = work.with_name("outdated")
        work.replace(outdated)
        shutil.rmtree(outdated, ignore_errors=True)
        raise
    final.parent.mkdir(parents=True, exist_ok=True)
    (work / VERSION).replace(final)


def _run(work: Path, request: Request, listing: Listing, workers: Workers) -> None:
    """Examines and writes what is not yet, so that the folder of the version is complete."""
    journals = [work / "examined" / f"{index:06d}.jsonl" for index in range(len(listing.portions))]
    examine = [
        ExaminePortion(portion, request.pictures, journal)
        for portion, journal in zip(listing.portions, journals, strict=True)
        if not journal.exists()
    ]
    workers.run(examine, len(journals), "examined")
    decision = decide(journals, request, listing)
    write, folder = [], work / VERSION
    for index, (portion, journal, splits) in enumerate(zip(listing.portions, journals, decision.splits, strict=True)):
        done = work / "written" / f"{index:06d}.json"
        if any(splits) and not done.exists():
            shards = {split: folder / decision.shards[index, split] for split in SPLITS if split in splits}
            fields = decision.fields
            write.append(WritePortion(portion, request.pictures, journal, splits, shards, fields, done))
    workers.run(write, sum(map(any, decision.splits)), "written")
    _describe(work, request, listing, decision)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of every item.

    Attributes:
      splits: of each portion, of each item: the name of its split; "" for what is left out.
      shards: (portion, split) -> name of the file.
      fields: of the records.
      left_out: items with "name", "reason" and "detail".
    """

    splits: Sequence[tuple[str, ...]]
    shards: Mapping[tuple[int, str], str]
    fields: RecordFields
    left_out: Sequence[Mapping[str, str]]


def decide(journals: Sequence[Path], request: Request, listing: Listing) -> Decision:
    """Decides of every item whether it is kept, and in which split.

    Of pictures with the same pixels the first is kept, and pixels alone say which split a picture belongs to.

    Raises:
      UserError: if nothing is left to train on.
    """
    captioned, labels = _survey(journals)
    numbers, names = _classes(labels, listing.class_names)
    named = not all(map(is_number, names))
    captions = "given" if captioned else "classes" if named else "none"
    left_out = [_explain(item.name, *item.rejected.args) for item in listing.ignored if item.rejected is not None]
    first: dict[bytes, str] = {}
    kept: list[list[bytes]] = []
    for journal in journals:
        kept.append([])
        for row in read_journal(journal):
            reason, detail, pixels = row.get("reason", ""), row.get("detail", ""), bytes.fromhex(row.get("pixels", ""))
            if not reason and (
                captions == "given" and not row["captions"] or captions == "classes" and row["label"] is None
            ):
                reason = "no caption"
            if not reason and pixels in first:
                reason, detail = "duplicate", f"of {first[pixels]}"
            if reason:
                left_out.append(_explain(row["name"], reason, detail))
            else:
                first[pixels] = row["name"]
            kept[-1].append(b"" if reason else pixels)
    threshold = _threshold(sorted(first), request.validation)
    splits = [tuple("" if not p else SPLITS[p < threshold] for p in portion) for portion in kept]
    if not any("train" in portion for portion in splits):
        examples = {each["reason"]: each for each in reversed(left_out)}
        counts = Counter(each["reason"] for each in left_out).most_common()
        reasons = "; ".join(f"{count} {reason} ({_example(examples[reason])})" for reason, count in counts)
        raise UserError(
            f"no picture of {request.source} is left to train on: {reasons or 'it has none'}; look at the files, and "
            "at --validation"
        )
    return Decision(splits, _shard_names(splits), RecordFields(captions, numbers, names), left_out)


def _example(left_out: Mapping[str, str]) -> str:
    """One of those that a reason left out, with what more there is to say."""
    return ": ".join(filter(None, (left_out["name"], left_out["detail"])))


def _survey(journals: Iterable[Path]) -> tuple[bool, set[str | int]]:
    """Whether any picture has a caption, and which classes there are."""
    captioned, labels = False, set()
    for journal in journals:
        for row in read_journal(journal):
            captioned |= bool(row.get("captions"))
            if row.get("label") is not None:
                labels.add(row["label"])
    return captioned, labels


def _explain(name: str, reason: str, detail: str) -> dict[str, str]:
    return {"name": name, "reason": reason, "detail": detail}


def _threshold(pixels: Sequence[bytes], validation: int | float) -> bytes:
    """The digest below which pictures are of the validation split; of a share, it does not depend on other pictures.

    A share that no picture falls into still gets one, where there are two.
    """
    if validation >= 1:
        return pixels[int(validation)] if validation < len(pixels) else b"\xff" * 17
    if not validation:
        return b""
    threshold = int(validation * 2**128).to_bytes(16, "big")
    return threshold if len(pixels) < 2 or pixels[0] < threshold else pixels[1]


def _shard_names(splits: Sequence[tuple[str, ...]]) -> dict[tuple[int, str], str]:
    names = {}
    for split in SPLITS:
        holders = [index for index, portion in enumerate(splits) if split in portion]
        for number, index in enumerate(holders):
            names[index, split] = f"{DATASET}-{split}.array_record-{number:05d}-of-{len(holders):05d}"
    return names


def _classes(labels: set[str | int], known: tuple[str, ...]) -> tuple[dict[str | int, int], tuple[str, ...]]:
    """The number that is stored for each class, and the names of all: in the order of numbers, then of the alphabet."""
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels):
        names = (*known, *map(str, range(len(known), max(numbers) + 1))) if numbers else ()
        return {label: label for label in numbers}, _distinct(names)
    names = sorted(set(map(str, labels)), key=lambda name: (0, float(name), name) if is_number(name) else (1, 0, name))
    places = {name: place for place, name in enumerate(names)}
    return {label: places[str(label)] for label in labels}, tuple(names)


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    """The names, with a number where one is empty or was there before: TFDS needs each once, and loses empty ones."""
    found: dict[str, None] = {}
    for number, name in enumerate(names):
        name = name or str(number)
        while name in found:
            name += f" ({number})"
        found[name] = None
    return tuple(found)


def _describe(work: Path, request: Request, listing: Listing, decision: Decision) -> None:
    """Writes what TFDS needs to read the shards, and the report."""
    folder = work / VERSION
    counts, sizes, encoded = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0), 0
    shapes: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    for index in sorted({index for index, _ in decision.shards}):
        written = json.loads((work / "written" / f"{index:06d}.json").read_text(encoding="utf-8"))
        encoded += written["encoded"]
        for split, found in written["shapes"].items():
            counts[split].append(len(found))
            shapes[split] += found
            sizes[split] += written["bytes"][split]
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=DATASET, filetype_suffix="array_record")
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=decision.fields.features(),
        split_infos=[
            tfds.core.SplitInfo(split, counts[split], sizes[split], template.replace(split=split))
            for split in SPLITS
            if counts[split]
        ],
        version=VERSION,
        filename_template=template,
        check_data=False,
        description=f"Pictures of {shown(request.source)}.",
    )
    for split in SPLITS:
        if shapes[split]:
            store_sizes(sizes_file(folder, split), np.array(shapes[split], np.int32))
    report = {
        "dataset": f"{DATASET}/{request.name}",
        "kind": listing.kind,
        "request": dataclasses.asdict(request),
        "fingerprint": listing.fingerprint,
        "notes": list(listing.notes),
        "captions": decision.fields.captions,
        "classes": list(decision.fields.class_names),
        "splits": {split: sum(counts[split]) for split in SPLITS if counts[split]},
        "encoded_again": encoded,
        "skipped": dict(Counter(each["reason"] for each in decision.left_out).most_common()),
        "left_out": list(decision.left_out),
    }
    with whole_file(folder / REPORT) as draft:
        draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def name_of_source(source: str) -> str:
    """A name for the dataset: the last part of its source's that is no pattern, in letters that a name may have."""
    for part in reversed(source.removeprefix("hf:").rstrip("/").split("/")):
        stem = part.partition("@")[0]
        if not re.search(r"[*?{[]", stem):
            stem = stem.partition(".")[0] or stem
            if name := re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-"):
                return name
    return "pictures"
