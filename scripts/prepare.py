"""`python -m scripts.prepare --dataset=scenes/single32`: makes a dataset and its tokenizer."""

import argparse
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cli import entry_point
from cli.errors import UserError
from cli.locations import Location, locate_from_home
from cli.plurals import spell_count
from data import folder
from data.records import DEFAULT_DATA_DIR, MADE_HERE, RecordSource, dataset_folder, known_datasets
from data.storage import DataHome
from data.tokenizer import Tokenizer

_DESCRIPTION = """\
Prepares a dataset on this machine and trains its tokenizer; what is already there is left as it is.

    --dataset=scenes/single32                      the embedded dataset, drawn here
    --dataset=drawings/emoji32                     drawings of OpenMoji with names (pip install '.[drawings]')
    --dataset=folder --source=DIR --name=pets      your own pictures: afterwards --config.data.dataset=folder/pets
    --dataset=cifar10                              any of TensorFlow Datasets, which downloads it

A run that was killed goes on where it was when the same command is started again. docs/own_data.md explains the rest.
"""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_OF_FOLDERS = (
    "source",
    "name",
    "image_field",
    "text_field",
    "label_field",
    "validation",
    "size",
    "resize",
    "encoding",
    "min_size",
    "workers",
)


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and prepares."""
    parser = entry_point.parser("scripts.prepare", _DESCRIPTION)
    known = ", ".join(known_datasets())
    parser.add_argument(
        "--dataset", default="scenes", help=f"scenes or drawings (all of it), {known}, folder, or a name of TFDS"
    )
    parser.add_argument(
        "--data_dir", default="", help=f"where datasets are kept, also gs://BUCKET/NAME (default {DEFAULT_DATA_DIR})"
    )
    parser.add_argument("--vocab_size", type=int, default=512, help="ids of the tokenizer at most (default 512)")
    parser.add_argument(
        "--inspect",
        nargs="?",
        const="",
        metavar="FILE",
        help="also write a page of pictures, captions, sizes and what was left out (default: beside the records)",
    )
    own = parser.add_argument_group("of --dataset=folder")
    own.add_argument(
        "--source",
        default="",
        help="a folder of pictures; a table of captions beside them; tar archives or parquet files, as '*.tar' or "
        "'gs://BUCKET/{000..010}.tar'; hf:ORGANIZATION/NAME",
    )
    own.add_argument("--name", default="", help="of the dataset, folder/NAME (default: that of the source)")
    own.add_argument("--image_field", default="", help="of a table: where names of pictures are (default: guessed)")
    own.add_argument("--text_field", default="", help="of a table: where captions are (default: guessed)")
    own.add_argument("--label_field", default="", help="of a table: where classes are (default: guessed)")
    own.add_argument(
        "--validation", type=float, default=0.05, help="share of the pictures, or number, for validation (default 0.05)"
    )
    own.add_argument("--size", type=int, default=0, help="make larger pictures this small, once (default: never)")
    resizes = "; ".join(f"{name}: {what}" for name, what in folder.RESIZES.items())
    own.add_argument("--resize", choices=folder.RESIZES, default="short", help=f"what --size is of. {resizes}")
    own.add_argument(
        "--encoding",
        choices=("jpeg", "png"),
        default="jpeg",
        help=f"of pictures that --size makes smaller (default jpeg, of quality {folder.JPEG_QUALITY})",
    )
    own.add_argument("--min_size", type=int, default=0, help="leave out pictures with a shorter side than this")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own.add_argument("--workers", type=int, default=min(cores, 16), help="processes (default: one a core, 16 at most)")
    options = parser.parse_args(arguments)
    if options.vocab_size < 257:
        raise UserError(f"--vocab_size must be at least 257 (padding and 256 bytes), not {options.vocab_size}")
    if options.dataset == folder.DATASET or options.dataset.startswith(f"{folder.DATASET}/"):
        prepare_folder(options)
        return
    if given := [name for name in _OF_FOLDERS if getattr(options, name) != parser.get_default(name)]:
        raise UserError(f"--{given[0]} is of --dataset=folder, not of {options.dataset}; leave it out")
    names = [name for name in known_datasets() if name == options.dataset or name.startswith(f"{options.dataset}/")]
    if not names and (group := options.dataset.split("/")[0]) in MADE_HERE:
        raise UserError(f"unknown dataset {options.dataset!r}; choose {group}, or {known}")
    if options.inspect and len(names) > 1:
        raise UserError(
            f"--inspect={options.inspect} is one page, and --dataset={options.dataset} is {', '.join(names)}; name "
            "one of them, or give --inspect without a file"
        )
    for name in names:
        prepare(name, options.data_dir, options.vocab_size)
        _inspect(name, options)
    if not names:
        prepare_named(options.dataset, options.data_dir, options.vocab_size)
        _inspect(options.dataset, options)


def prepare(dataset: str, data_dir: str, vocab_size: int) -> None:
    """Writes one of the datasets that are made here and the tokenizer of its training captions."""
    start = time.monotonic()
    print(f"preparing {dataset} (nothing is downloaded)", flush=True)
    group, _, name = dataset.partition("/")
    home = DataHome.open(data_dir or DEFAULT_DATA_DIR)
    if not home.published(dataset):
        try:
            MADE_HERE[group].prepare(name, home.made)
        except OSError as error:
            raise _cannot_write(home, error) from error
    _finish(dataset, home, vocab_size, start)


def prepare_named(dataset: str, data_dir: str, vocab_size: int) -> None:
    """Has TFDS download and write a dataset that it knows, and writes the tokenizer of its captions."""
    start = time.monotonic()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every attempt that it repeats
    home = DataHome.open(data_dir or DEFAULT_DATA_DIR)
    try:
        if not home.published(dataset):
            builder = tfds.builder(dataset, data_dir=home.made, file_format="array_record")
            if not builder.is_prepared():
                print(f"preparing {dataset} with TensorFlow Datasets, which downloads it", flush=True)
                builder.download_and_prepare()
    except Exception as error:  # TFDS and its datasets raise of every kind, for a name as for a network
        detail = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())[:200]
        if isinstance(error, DatasetNotFoundError):
            choices = ", ".join(
                (*MADE_HERE, *known_datasets(), "folder with a --source, or a name of TensorFlow Datasets")
            )
            raise UserError(f"unknown dataset {dataset!r}; choose {choices}") from error
        if isinstance(error, ImportError):
            detail += "; for most datasets that means TensorFlow: pip install 'tensorflow-cpu>=2.21'"
        raise UserError(f"TensorFlow Datasets cannot prepare {dataset}: {detail}") from error
    _finish(dataset, home, vocab_size, start)


def prepare_folder(options: argparse.Namespace) -> None:
    """Writes a dataset of a user's own pictures, says what was left out of it and why, and writes the tokenizer."""
    start = time.monotonic()
    request = _request(options)
    if options.workers < 1:
        raise UserError("--workers must be at least 1")
    listing = folder.list_source(request.source, request.fields)
    dataset = f"{folder.DATASET}/{request.name}"
    print(f"preparing {dataset} of {listing.kind}: {'; '.join(listing.notes) or 'no captions'}", flush=True)
    home = DataHome.open(options.data_dir or DEFAULT_DATA_DIR)
    if home.published(dataset):
        report = folder.prepared_before(home.kept / dataset / folder.VERSION, request, listing)
    else:
        try:
            report = folder.prepare(request, listing, home.made, options.workers)
        except OSError as error:
            raise _cannot_write(home, error) from error
    _print_report(report, home.kept / dataset / folder.VERSION)
    _finish(dataset, home, options.vocab_size, start)
    _inspect(dataset, options, report)


def _request(options: argparse.Namespace) -> folder.Request:
    """What is asked for, once it makes sense."""
    name = options.dataset.partition("/")[2] or options.name or folder.name_of_source(options.source)
    if not options.source:
        raise UserError("--dataset=folder needs a --source: a folder of pictures; docs/own_data.md has all kinds")
    if options.name and name != options.name:
        raise UserError(f"--dataset={options.dataset} and --name={options.name} disagree; give --dataset=folder")
    if not _NAME.fullmatch(name):
        raise UserError(f"--name={name!r} must be of letters, digits, _, - and ., and not begin with - or .")
    validation = options.validation
    if not 0 <= validation < float("inf") or (validation >= 1 and validation != int(validation)):
        raise UserError(f"--validation must be a share below 1, or a whole number of pictures, not {validation}")
    if options.size < 0 or options.min_size < 0:
        raise UserError("--size and --min_size must not be negative")
    return folder.Request(
        name,
        options.source,
        folder.Fields(options.image_field, options.text_field, options.label_field),
        validation,
        folder.PictureSettings(options.size, options.resize, options.encoding, options.min_size),
    )


def _print_report(report: dict[str, Any], path: Location) -> None:
    """A table of what was left out, with the first files of each reason."""
    total = sum(report["skipped"].values())
    if report["encoded_again"]:
        print(f"{spell_count(report['encoded_again'], 'picture was', 'pictures were')} made smaller and encoded again")
    print(f"left out: {total:,}" + (f", all of them in {path / folder.REPORT}" if total else ""))
    for reason, count in report["skipped"].items():
        print(f"  {count:>9,}  {reason}: {folder.REASONS[reason]}")
        for each in [each for each in report["left_out"] if each["reason"] == reason][:2]:
            print(f"             {each['name']}" + (f" ({each['detail']})" if each["detail"] else ""))


def _finish(dataset: str, home: DataHome, vocab_size: int, start: float) -> None:
    """Trains the tokenizer of a dataset that has captions and none yet, moves it home, and says what is there."""
    data_dir = str(home.kept if home.published(dataset) else home.made)
    path = dataset_folder(dataset, data_dir)
    tokenizer_file = path / "tokenizer.json"
    source = RecordSource(dataset, "train", data_dir, pictures=False, fields=())
    if source.has_captions and not tokenizer_file.is_file():
        captions = {caption for index in range(len(source)) for caption in source[index]["captions"]}
        Tokenizer.train(sorted(captions), vocab_size).save(tokenizer_file)
    classes = "".join(
        f", {spell_count(len(names), 'class', 'classes')} ({name})" for name, names in source.class_names.items()
    )
    ids = Tokenizer.load(tokenizer_file).vocab_size if source.has_captions else 0
    text = f"{ids} text ids" if ids else "no captions"
    home.publish(path)
    where = f"{home.place(path)} ({time.monotonic() - start:.0f} s)"
    print(f"{dataset}: {spell_count(len(source), 'training picture')}, {text}{classes}, in {where}")
    if ids and not dataset.startswith("scenes/"):
        clip = f"--config.models.clip.text_vocab_size={ids + 2} --config.models.clip.text_end_id={ids + 1}"
        print(f"train on it with --config.data.dataset={dataset}; a CLIP also takes {clip}")


def _inspect(dataset: str, options: argparse.Namespace, report: Mapping[str, Any] | None = None) -> None:
    """Writes the page that shows a dataset, where it is asked for."""
    if options.inspect is None:
        return
    from evaluation.dataset_page import write_dataset_page

    where = dataset_folder(dataset, options.data_dir)
    path = locate_from_home(options.inspect) if options.inspect else where / "inspect.html"
    source = RecordSource(dataset, "train", options.data_dir)
    tokenizer = Tokenizer.load(where / "tokenizer.json") if source.has_captions else None
    try:
        write_dataset_page(path, source, dataset, tokenizer, report or {})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --inspect") from error
    print(f"look at it: {path}")


def _cannot_write(home: DataHome, error: OSError) -> UserError:
    return UserError(
        f"cannot write the dataset to {home.made}: {error.strerror or error}; "
        + ("set XDG_CACHE_HOME to another folder" if home.made != home.kept else "choose another --data_dir")
    )


if __name__ == "__main__":
    entry_point.run(main)
