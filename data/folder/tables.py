"""Tables of captions: rows of CSV and JSON lines, read one at a time and never further than a limit."""

import csv
import dataclasses
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.errors import UserError
from data.folder.captions import (
    IMAGE_FIELDS,
    LABEL_FIELDS,
    TEXT_FIELDS,
    captions_of_value,
    choose_field,
    class_of_value,
    decode_text,
    parse_json,
)
from data.folder.items import MAX_TEXT, Item, Rejected, shown

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
NAMES = frozenset(f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in (".csv", ".tsv", ".jsonl"))

MAX_ROWS = 20_000_000  # that are kept in memory, some 300 bytes each
_MAX_COLUMNS = 1000


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of fields that a user asked for; "" where they are to be guessed."""

    image: str = ""
    text: str = ""
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a table says of a picture.

    Attributes:
      line: of the table, from 1.
      file: the picture's name, as it is written there.
      captions: of the picture.
      label: its class, by name or number; None for none.
    """

    line: int
    file: str
    captions: tuple[str, ...]
    label: str | int | None


@dataclasses.dataclass
class Table:
    """The rows of a file, with what was found on the way.

    Attributes:
      path: of the file.
      fields: that were asked for.
      notes: which fields were taken; filled as rows are read.
      ignored: rows that cannot be read.
    """

    path: Path
    fields: Fields
    notes: list[str] = dataclasses.field(default_factory=list)
    ignored: list[Item] = dataclasses.field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        """Yields rows in order.

        Raises:
          UserError: if the file cannot be opened or has no row, or no field has the names of pictures.
        """
        is_json = self.path.suffix.lower() == ".jsonl"
        known: dict[str, None] = {}
        image = text = label = None
        has_classes = False
        for count, (line, record) in enumerate(self._json_records() if is_json else self._csv_records()):
            if count == MAX_ROWS:
                raise UserError(
                    f"{self.path} has more than {MAX_ROWS:,} rows; split it, with its pictures, into several"
                )
            # A line of JSON may have fields that none before it had.
            if None in (image, text, label) and len(known) < _MAX_COLUMNS and not known.keys() >= record.keys():
                known.update((name, None) for name in record if len(name) < 1000)
                image = image or _field(self.fields.image, known, IMAGE_FIELDS)
                text = text or _field(self.fields.text, known, TEXT_FIELDS)
                label = label or _field(self.fields.label, known, LABEL_FIELDS)
                if not is_json:
                    self._check(image, text, label, list(known))
            try:
                if not isinstance(file := record.get(image), str) or not file:
                    where = f"in field {image!r}" if image else "in any field"
                    raise Rejected("unreadable", f"no name of a picture {where}")
                captions = captions_of_value(record.get(text)) if text else ()
                named = class_of_value(record.get(label)) if label else None
                has_classes |= named is not None
                yield Row(line, file, captions, named)
            except Rejected as rejected:
                self._ignore(line, rejected)
        if known:
            self._check(image, text, label, list(known))
            taken = {"pictures": image, "captions": text, "classes" if has_classes else "no classes": label}
            found = ", ".join(f"{what} of field {name!r}" for what, name in taken.items() if name is not None)
            self.notes.append(f"{shown(self.path.name)}: {found}")
        elif self.ignored and (rejected := self.ignored[0].rejected):
            raise UserError(f"no row of {self.path} can be read ({rejected.detail}); check it, and save it as UTF-8")
        else:
            raise UserError(f"{self.path} has no rows; fill it, or take it away")

    def _check(self, image: str | None, text: str | None, label: str | None, known: list[str]) -> None:
        """Raises a UserError where a field that was asked for is not there, or none that is needed."""
        where = str(self.path)
        for option, found in (("image", image), ("text", text), ("label", label)):
            if found is None:
                choose_field(getattr(self.fields, option), known, (), f"{option}_field", where)
        if image is None or text is label is None:
            missing = "--text_field, that of captions" if image else "--image_field, that of the pictures' file names"
            raise UserError(f"{where} has the fields {', '.join(map(repr, known))[:1000]}; name by {missing}")

    def _ignore(self, line: int, rejected: Rejected) -> None:
        reason = "unreadable" if rejected.reason == "bad caption" else rejected.reason
        name = f"{shown(self.path.name)}, line {line}"
        self.ignored.append(Item(name, rejected=Rejected(reason, rejected.detail)))

    def _lines(self) -> Iterator[tuple[int, str]]:
        """The lines of the file, numbered from 1, each with its line feed; a line that cannot be read is left out."""
        try:
            with open(self.path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise UserError(f"{self.path} is no file; give a table as CSV or JSON lines")
                number = 0
                while data := file.readline(MAX_TEXT + 1):
                    number += 1
                    try:
                        if len(data) > MAX_TEXT:
                            while data and not data.endswith(b"\n"):
                                data = file.readline(MAX_TEXT)
                            raise Rejected("unreadable", f"more than {MAX_TEXT:,} bytes in one line")
                        yield number, decode_text(data)
                    except Rejected as rejected:
                        self._ignore(number, rejected)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; check it and its rights") from error

    def _json_records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, line in self._lines():
            if not line.strip():
                continue
            try:
                value = parse_json(line)
                if not isinstance(value, dict):
                    raise Rejected("unreadable", "no JSON object")
                yield number, value
            except Rejected as rejected:
                self._ignore(number, rejected)

    def _csv_records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Rows by the names of the first line; a quoted field may go over several lines."""
        start = 0  # line of the row that is being read; 0 until it is known

        def lines() -> Iterator[str]:
            nonlocal start
            for number, line in self._lines():
                start = start or number
                yield line

        source = lines()
        first = next(source, "")
        if start != 1 and self.ignored and (rejected := self.ignored[0].rejected):
            raise UserError(
                f"the first line of {self.path} must name its fields and cannot be read ({rejected.detail}); save it "
                "as UTF-8"
            )
        delimiter = "\t" if self.path.suffix.lower() == ".tsv" else max(",\t;|", key=first.count)
        try:
            header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter, strict=True), [])]
        except csv.Error as error:
            raise UserError(f"the first line of {self.path} must name its fields ({error})") from error
        if len(set(header)) < len(header) or len(header) > _MAX_COLUMNS:
            raise UserError(f"the first line of {self.path} must name its fields, each once; it has {header[:8]}")
        csv.field_size_limit(MAX_TEXT)  # of this process; it would be 128 KiB
        reader = csv.reader(source, delimiter=delimiter, strict=True)
        while True:
            start = 0
            try:
                values = next(reader)
                if not values:
                    continue
                if len(values) != len(header):
                    raise Rejected("unreadable", f"{len(values)} fields, not {len(header)}; quote what holds commas")
                yield start, dict(zip(header, values, strict=True))
            except StopIteration:
                return
            except csv.Error as error:
                self._ignore(start, Rejected("unreadable", str(error)))
            except Rejected as rejected:
                self._ignore(start, rejected)


def _field(asked: str, known: Iterable[str], guesses: Sequence[str]) -> str | None:
    """The field that was asked for, or else guessed; None as long as there is none."""
    return (asked if asked in known else None) if asked else choose_field("", list(known), guesses, "", "")
