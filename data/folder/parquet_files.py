"""Parquet files with pictures inside: a column of bytes or, as Hugging Face writes it, of {bytes, path}; and captions.

A page is in memory at a time, which the format bounds at 2 GiB, and one row, since a few bytes of a dictionary can
stand for the same large value in every row.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cli.errors import UserError
from cli.locations import Location, in_store
from cli.plurals import spell_count
from data.folder.captions import (
    IMAGE_FIELDS,
    LABEL_FIELDS,
    TEXT_FIELDS,
    captions_of_value,
    choose_field,
    class_of_value,
)
from data.folder.items import (
    MAX_PICTURE,
    MAX_TEXT,
    Item,
    Listing,
    Portion,
    Rejected,
    fingerprint_of_files,
    open_file,
    shown,
)
from data.folder.tables import Fields

SUFFIX = ".parquet"
PORTION = 512  # rows that make a portion, or the whole row groups that have them

_MAX_LIST = 1000  # captions of one picture
_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)


@dataclasses.dataclass(frozen=True)
class ParquetPortion(Portion):
    """Some row groups of a file.

    Attributes:
      path: of the file.
      name: that is shown.
      groups: numbers of the row groups.
      first: number of their first row in the file.
      image: column of pictures.
      text: column of captions; None for none.
      label: column of classes; None for none.
    """

    path: Location
    name: str
    groups: tuple[int, ...]
    first: int
    image: str
    text: str | None
    label: str | None

    def read(self) -> Iterator[Item]:
        """Yields rows in order."""
        row = self.first
        columns = [name for name in (self.image, self.text, self.label) if name is not None]
        try:
            with _open(self.path) as file:
                for batch in file.iter_batches(1, row_groups=list(self.groups), columns=columns):
                    yield self._item(f"{self.name}, row {row}", batch)
                    row += 1
        except _ERRORS as error:
            detail = f"{' '.join(str(error).split())[:300] or type(error).__name__}; the row group is lost from there"
            yield Item(f"{self.name}, row {row}", rejected=Rejected("unreadable", detail))

    def _item(self, name: str, batch: pa.RecordBatch) -> Item:
        try:
            value = batch.column(self.image)[0]
            if isinstance(value, pa.StructScalar) and value.is_valid:
                if _has_path(value.type) and isinstance(path := _text(value["path"]), str):
                    name = f"{name} ({shown(path[:200])})"
                value = value["bytes"]
            value = _stored(value)
            if not value.is_valid:
                raise Rejected("missing", "the picture itself is not in the file")
            captions: tuple[str, ...] = ()
            if self.text is not None:
                captions = captions_of_value(_text(batch.column(self.text)[0]))
            label = class_of_value(_plain(batch.column(self.label)[0])) if self.label is not None else None
            return Item(name, _bytes(value, "too large", MAX_PICTURE), captions, label)
        except Rejected as rejected:
            return Item(name, rejected=rejected)


def list_parquet(paths: Sequence[tuple[str, Location]], fields: Fields) -> Listing:
    """Looks at the columns and row groups of files.

    Raises:
      UserError: if one cannot be read, or they have no column of pictures.
    """
    portions: list[ParquetPortion] = []
    notes: list[str] = []
    class_names: tuple[str, ...] = ()
    for name, path in paths:
        try:
            with _open(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
                rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        except _ERRORS as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(f"{name} cannot be read as parquet ({detail}); fetch it again, or leave it out") from error
        image, text, label = _choose(schema, fields, name)
        if twice := [column for column in (image, text, label) if column and schema.names.count(column) > 1]:
            raise UserError(f"{name} has several columns {twice[0]!r}; rename them, or name another by its option")
        if label is not None and not class_names:
            class_names = _class_names(schema, label)
        note = {"pictures": image, "captions": text, "classes": label}
        said = ", ".join(f"{what} of column {column!r}" for what, column in note.items() if column is not None)
        if said not in notes:
            notes.append(said)
        for groups, first in _parts(rows):
            portions.append(ParquetPortion(path, name, groups, first, image, text, label))
    kind = spell_count(len(paths), "parquet file")
    return Listing(kind, portions, fingerprint_of_files(paths), notes=notes, class_names=class_names)


def is_parquet(name: str) -> bool:
    """Whether a file's name is that of a parquet file."""
    return name.lower().endswith(SUFFIX)


def _open(path: Location) -> pq.ParquetFile:
    # Column chunks are read a buffer at a time, not whole; a footer of any size is refused by the reader's own limits.
    return pq.ParquetFile(open_file(path) if in_store(path) else path, pre_buffer=False, buffer_size=2**20)


def _parts(rows: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Row groups put together until they have `PORTION` rows, with the number of the first row."""
    groups: list[int] = []
    first = count = 0
    for index, number in enumerate(rows):
        groups.append(index)
        count += max(number, 0)
        if count >= PORTION or index == len(rows) - 1:
            yield tuple(groups), first
            groups, first, count = [], first + count, 0


def _choose(schema: pa.Schema, fields: Fields, where: str) -> tuple[str, str | None, str | None]:
    structs = [field.name for field in schema if _has_bytes(field.type)]
    pictures = structs + [field.name for field in schema if _is_binary(field.type)]
    texts = [field.name for field in schema if _is_text(field.type)]
    labels = [field.name for field in schema if _is_plain(field.type) or _is_string(field.type)]
    image = choose_field(fields.image, pictures, IMAGE_FIELDS, "image_field", where)
    if image is None and len(pictures) == 1:
        image = pictures[0]
    if image is None:
        known = shown(", ".join(f"{field.name} ({field.type})" for field in schema)[:500])
        raise UserError(f"{where} has no column that is known to hold pictures; name it by --image_field: {known}")
    text = choose_field(fields.text, texts, TEXT_FIELDS, "text_field", where)
    return image, text, choose_field(fields.label, labels, LABEL_FIELDS, "label_field", where)


def _kind(kind: pa.DataType) -> pa.DataType:
    """The type of values, where a dictionary holds them too, as pandas writes categories."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _stored(value: Any) -> Any:
    """The value itself, where a dictionary holds it."""
    return value.value if isinstance(value, pa.DictionaryScalar) and value.is_valid else value


def _is_binary(kind: pa.DataType) -> bool:
    kind = _kind(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_string(kind: pa.DataType) -> bool:
    kind = _kind(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    """Whether values are texts, or lists of texts."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return _is_string(kind.value_type if lists else kind)


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values are numbers or true and false."""
    kind = _kind(kind)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and (at := kind.get_field_index("bytes")) >= 0 and _is_binary(kind.field(at).type)


def _has_path(kind: pa.DataType) -> bool:
    return (at := kind.get_field_index("path")) >= 0 and _is_string(kind.field(at).type)


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """The names of classes that Hugging Face's datasets library writes beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    known = isinstance(names, list) and len(names) < 2**20 and all(isinstance(name, str) for name in names)
    return tuple(shown(" ".join(name.split())) for name in names) if known else ()


def _bytes(value: Any, reason: str, limit: int) -> bytes:
    buffer = value.as_buffer()
    if buffer is None:
        return b""
    if buffer.size > limit:
        raise Rejected(reason, f"{buffer.size:,} bytes")
    return buffer.to_pybytes()


def _text(value: Any) -> str | list[str] | None:
    """The text of a value, or its texts."""
    value = _stored(value)
    if not value.is_valid:
        return None
    if isinstance(value, pa.ListScalar | pa.LargeListScalar):
        texts = (_text(each) for each in value.values[:_MAX_LIST])
        return [text for text in texts if isinstance(text, str)]
    try:
        return _bytes(value, "bad caption", MAX_TEXT).decode()
    except UnicodeDecodeError as error:
        raise Rejected("bad caption", f"not UTF-8 at byte {error.start}") from error


def _plain(value: Any) -> Any:
    value = _stored(value)
    return value.as_py() if _is_plain(value.type) else _text(value)
