"""One portion of a source, looked at: every picture decoded once, and what is known of it then, a line of JSON each.

Then one portion written: the pictures that are kept, as records in the shards of their splits. Both passes read the
same bytes, which is checked, and depend on nothing but the portion and the settings; so a portion that was finished
before a kill is finished.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from cli.errors import UserError
from data.folder.items import Item, Portion
from data.pictures import PictureError, read_picture
from data.storage import disk_errors, whole_file

RESIZES = {
    "short": "the short side becomes --size, the other one in proportion",
    "long": "the long side becomes --size, the other one in proportion",
    "square": "the central square, of --size",
}
JPEG_QUALITY = 95


_MAX_JPEG = 65_500  # pixels of a side that the JPEG library writes


class SourceChanged(UserError):
    """What is read to be written is not what was examined."""


@dataclasses.dataclass(frozen=True)
class PictureSettings:
    """What is done to pictures once and for all.

    Attributes:
      size: pixels; larger pictures are made smaller, none is made larger. 0 leaves the bytes of every file alone.
      resize: a key of `RESIZES`.
      encoding: "jpeg" (of quality 95, colors at full resolution) or "png", of pictures that were resized; those that
        JPEG cannot hold, of more than 65,500 pixels a side, are PNG.
      min_size: pixels of the short side that a picture needs; 0 for any.
    """

    size: int = 0
    resize: str = "short"
    encoding: str = "jpeg"
    min_size: int = 0


@dataclasses.dataclass(frozen=True)
class ExaminePortion:
    """Examines a portion when it is called, in whatever process."""

    portion: Portion
    settings: PictureSettings
    journal: Path

    def __call__(self) -> int:
        """Writes the journal, whole or not at all; returns the number of its items."""
        lines = [json.dumps(self._examine(item), ensure_ascii=True) for item in self.portion.read()]
        with whole_file(self.journal) as draft:
            draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return len(lines)

    def _examine(self, item: Item) -> dict[str, Any]:
        if item.rejected is not None:
            return {"name": item.name, "reason": item.rejected.reason, "detail": item.rejected.detail}
        try:
            pixels = read_picture(item.data)
        except PictureError as error:
            return {"name": item.name, "reason": "corrupt", "detail": str(error)}
        height, width = pixels.shape[:2]
        if min(height, width) < self.settings.min_size:
            return {"name": item.name, "reason": "too small", "detail": f"{width} x {height}"}
        digest = hashlib.blake2b(f"{width} x {height}".encode(), digest_size=16)
        digest.update(pixels.tobytes())
        return {
            "name": item.name,
            "file": _file_digest(item),
            "pixels": digest.hexdigest(),
            "size": resized_size((height, width), self.settings),
            "captions": len(item.captions),
            "label": item.label,
        }


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


@dataclasses.dataclass(frozen=True)
class RecordFields:
    """What is stored of a picture beside its name and bytes.

    Attributes:
      captions: "given", "classes" (the name of the class is the caption) or "none".
      numbers: name or number of a class, as the source has it -> its number.
      class_names: of all classes; () where there are none.
    """

    captions: str
    numbers: Mapping[str | int, int]
    class_names: tuple[str, ...]

    def features(self) -> tfds.features.FeaturesDict:
        """The features of a record: `id`, `image`, and what there is of `captions` and `label`."""
        fields: dict[str, Any] = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(None, None, 3))}
        if self.captions != "none":
            fields["captions"] = tfds.features.Sequence(tfds.features.Text())
        if self.class_names:
            fields["label"] = tfds.features.ClassLabel(names=list(self.class_names))
        return tfds.features.FeaturesDict(fields)

    def values(self, item: Item) -> dict[str, Any]:
        """The values of `captions` and `label`; -1 stands for no class, as in TFDS."""
        number = -1 if item.label is None else self.numbers[item.label]
        values: dict[str, Any] = {}
        if self.captions != "none":
            named = self.captions == "classes"
            values["captions"] = [self.class_names[number].replace("_", " ")] if named else list(item.captions)
        if self.class_names:
            values["label"] = number
        return values


@dataclasses.dataclass(frozen=True)
class WritePortion:
    """Writes the kept pictures of a portion when it is called.

    Attributes:
      portion: to read again.
      settings: of pictures.
      journal: of the same portion.
      splits: of each item, the name of its split; "" for what is left out.
      shards: split -> the file of this portion's records.
      fields: of its records.
      done: the file that says that all of this is written.
    """

    portion: Portion
    settings: PictureSettings
    journal: Path
    splits: tuple[str, ...]
    shards: Mapping[str, Path]
    fields: RecordFields
    done: Path

    def __call__(self) -> int:
        """Returns the number of items."""
        features = self.fields.features()
        drafts = {split: path.with_name(f"{path.name}.{os.getpid()}.draft") for split, path in self.shards.items()}
        writers: dict[str, ArrayRecordWriter] = {}
        sizes, encoded = dict.fromkeys(self.shards, 0), 0
        shapes: dict[str, list[tuple[int, int]]] = {split: [] for split in self.shards}
        try:
            for split, path in drafts.items():
                with disk_errors():
                    writers[split] = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            for item, split, shape in self._items():
                record, again = self._record(item)
                serialized = _serialize(features, record)
                with disk_errors():
                    writers[split].write(serialized)
                sizes[split] += len(serialized)
                shapes[split].append(shape)
                encoded += again
        finally:
            for writer in writers.values():
                with disk_errors():
                    writer.close()
        for split, draft in drafts.items():
            draft.replace(self.shards[split])
        with whole_file(self.done) as draft:
            draft.write_text(json.dumps({"bytes": sizes, "shapes": shapes, "encoded": encoded}), encoding="utf-8")
        return len(self.splits)

    def _items(self) -> Iterator[tuple[Item, str, tuple[int, int]]]:
        """The items that are kept, with their splits and the heights and widths that their pictures get."""
        changed = SourceChanged("the source changed while it was prepared; run the same command again")
        rows = read_journal(self.journal)
        count = 0
        for count, item in enumerate(self.portion.read(), start=1):
            if count > len(rows) or item.name != rows[count - 1]["name"]:
                raise changed
            if split := self.splits[count - 1]:
                if item.rejected is not None or _file_digest(item) != rows[count - 1]["file"]:
                    raise changed
                yield item, split, rows[count - 1]["size"]
        if count != len(rows):
            raise changed

    def _record(self, item: Item) -> tuple[dict[str, Any], bool]:
        """The record of an item, and whether its picture had to be encoded again."""
        data = resized(item.data, self.settings)
        return {"id": item.name, "image": data, **self.fields.values(item)}, data is not item.data


def resized_size(size: Sequence[int], settings: PictureSettings) -> tuple[int, int]:
    """The height and width that a picture of `size` is stored with."""
    height, width = size
    if not settings.size:
        return height, width
    if settings.resize == "square":
        side = min(height, width, settings.size)
        return side, side
    scale = min(1, settings.size / (min if settings.resize == "short" else max)(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resized(data: bytes, settings: PictureSettings) -> bytes:
    """The file of a picture that was made smaller; the very same bytes where nothing has to change."""
    if not settings.size:
        return data
    picture = Image.fromarray(read_picture(data))
    width, height = picture.size
    after = resized_size((height, width), settings)
    if after == (height, width):
        return data
    box = None
    if settings.resize == "square":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    picture = picture.resize(after[::-1], Image.Resampling.LANCZOS, box=box)
    file = io.BytesIO()
    if settings.encoding == "png" or max(after) > _MAX_JPEG:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _serialize(features: tfds.features.FeaturesDict, record: Mapping[str, Any]) -> bytes:
    """A record as TFDS stores it, with its fields in an order that does not change from process to process."""
    example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
    example.ParseFromString(features.serialize_example(features.encode_example(record)))
    return example.SerializeToString(deterministic=True)


def _file_digest(item: Item) -> str:
    digest = hashlib.blake2b(item.data, digest_size=16)
    digest.update(json.dumps([item.captions, item.label]).encode())
    return digest.hexdigest()
