"""Records of stored datasets: where they lie, and what of a record is used.

One rule holds for training and for every metric. A blank caption is no caption: the record's next one takes its place.
Training passes over a record that cannot be read, or has no caption or class where one is needed, and counts it; the
next record takes its place. Evaluation is of the records that a user asked for, and names the first that has none
before anything is computed.
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int32
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import Location, explain, in_store, locate, locate_from_home
from cli.plurals import spell_count
from data import drawings, scenes
from data.bounded_cache import BoundedCache
from data.fields import captions_of, find_image_field, find_text_field, no_captions
from data.pictures import PictureError, as_rgb, read_picture
from data.record_parser import RecordParser
from data.storage import find_versions
from data.tally import DAMAGED, INCOMPLETE, Tally

CAPTIONS = "captions"  # the key of a record, whatever field they come from
PLACE = "place"  # the key of a record's own number, which is not the one asked for where that record is passed over

CACHE_BYTES = 2**32  # of decoded records that a process keeps of a split; what has no room is decoded each time

READ_AGAIN = (0.1, 1.0)  # seconds to wait before a record that could not be read is read again

DEFAULT_DATA_DIR: str = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")  # as TFDS itself has it

MADE_HERE: Mapping[str, Any] = {"scenes": scenes, "drawings": drawings}  # each with `NAMES` and `prepare`

# TFDS suggests OpenCV for every source it opens; Pillow is enough.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def dataset_folder(dataset: str, data_dir: str | None) -> Location:
    """Returns the folder of a prepared dataset, such as `scenes/single32`, in its newest version.

    Args:
      dataset: a TFDS name, `dataset[/config]`.
      data_dir: where datasets are kept, here or in a store; None or "" for TFDS's own default.

    Raises:
      UserError: if it was not prepared.
    """
    root = locate_from_home(data_dir or DEFAULT_DATA_DIR)
    versions = find_versions(root / dataset)
    if not versions:
        raise UserError(f"dataset {dataset} is not in {root}; {_how_to_prepare(dataset, data_dir)}")
    return max(versions, key=lambda path: [int(number) for number in path.name.split(".")])


def known_datasets() -> tuple[str, ...]:
    """Names of the datasets that `scripts.prepare` can make without the internet."""
    return tuple(f"{group}/{name}" for group, made in MADE_HERE.items() for name in made.NAMES)


def _how_to_prepare(dataset: str, data_dir: str | None) -> str:
    """What prepares a dataset."""
    group, _, name = dataset.partition("/")
    if group in MADE_HERE and dataset not in known_datasets():
        return f"choose one of {', '.join(known_datasets())}"
    where = f" --data_dir={data_dir}" if data_dir else ""
    own = f"folder --source=... --name={name or '...'}"
    return f"run `python -m scripts.prepare --dataset={own if group == 'folder' else dataset}{where}`"


def _read_index(dataset: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """What a dataset's own files say of it.

    Raises:
      UserError: if they are not there, damaged, or of a form that has no random access.
    """
    folder = dataset_folder(dataset, data_dir)
    again = f"move it away and {_how_to_prepare(dataset, data_dir)}"
    try:
        builder = tfds.builder_from_directory(folder)
        complete = bool(builder.info.features) and bool(builder.info.splits)
        random_access = builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD
    except Exception as error:  # the readers of these files raise of every kind
        line = " ".join(str(error).split())[:200]
        damaged = f"the index of dataset {dataset} in {folder} is damaged ({line}); {again}"
        raise explain(error) or UserError(damaged) from error
    if not complete:
        raise UserError(f"the index of dataset {dataset} in {folder} names no features or no splits; {again}")
    if not random_access:
        raise UserError(f"dataset {dataset} in {folder} was prepared in a format without random access; {again}")
    return builder


def _compare_counts(instructions: Iterable[Any], dataset: str, data_dir: str | None) -> None:
    """Raises UserError if a shard on this machine has more or fewer records than its index says, or is no such file."""
    for each in instructions:
        path = locate(str(each.filename))
        if in_store(path) or not path.is_file():
            continue
        try:
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            reader.close()
        except RuntimeError as error:
            if isinstance(reason := _reading_error(error, dataset), UserError):
                raise reason from error
            continue  # damaged within: records that cannot be read are passed over one by one
        if count != each.examples_in_shard:
            raise UserError(
                f"{path} has {spell_count(count, 'record')}, and the index says {each.examples_in_shard}; "
                f"copy the dataset again, or move it away and {_how_to_prepare(dataset, data_dir)}"
            )


def _reading_error(error: RuntimeError, dataset: str) -> ValueError | UserError:
    """What ArrayRecord's only error means: ValueError of damaged bytes, UserError if a file cannot be read at all."""
    what = " ".join(str(error).split())[:300]
    if what.startswith("Corrupted"):
        return ValueError(what)
    return explain(error) or UserError(f"a file of {dataset} cannot be read: {what}; prepare the dataset again")


class RecordSource:
    """Random access to one split's records: pictures as `read_picture` reads them, captions as str.

    A record that cannot be decoded, or read in a few attempts, is replaced by the next one and counted in `tally`, so
    that one bad file does not end a run of days, and a storage that fails for a moment does not change the stream. One
    that lacks what is needed is replaced too.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        data_dir: str | None = None,
        *,
        cache: bool = False,
        pictures: bool = True,
        captions: bool = True,
        fields: Collection[str] | None = None,
        needs: Collection[str] = (),
        image_field: str = "",
        text_field: str = "",
        read: Callable[[bytes], Any] = read_picture,
    ):
        """Opens a split.

        Args:
          dataset: TFDS name.
          split: TFDS split expression, such as `train` or `train[:90%]`.
          data_dir: see `dataset_folder`.
          cache: keep decoded records in memory once read, up to `CACHE_BYTES` of them; for datasets that fit there.
          pictures: read them as `image`.
          captions: read them as `captions`.
          fields: names of other stored fields to decode, where the dataset has them; None for all. What is not decoded
            costs neither time nor memory. Other fields of pictures stay the bytes of their files.
          needs: what a record must have to be used: "captions", names of fields of class numbers.
          image_field: which stored field is `image`; see `data.fields`.
          text_field: which stored field is `captions`.
          read: makes `image` of the bytes of a file.

        Raises:
          UserError: if the dataset is not prepared, its index is damaged or tells another number of records than
            there are, or it has no such split, pictures, captions or class numbers.
        """
        builder = _read_index(dataset, data_dir)
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._source = builder.as_data_source(split=split, deserialize_method=raw)  # pyright: ignore[reportCallIssue]
        except ValueError as error:
            raise UserError(
                f"dataset {dataset} has no split {split!r}; it has {', '.join(builder.info.splits)}"
            ) from error
        if not len(self._source):
            raise UserError(f"split {split!r} of {dataset} is empty; prepare the dataset again")
        _compare_counts(builder.info.splits[split].file_instructions, dataset, data_dir)
        stored: Any = builder.info.features
        self._dataset, self._split, self._stored = dataset, split, dict(stored.items())
        self._image = find_image_field(self._stored, image_field, dataset) if pictures else None
        self._text = find_text_field(self._stored, text_field, dataset) if captions else None
        self._needs, self._read_picture = tuple(needs), read
        self.require_fields(needs)
        chosen = {self._image, self._text, *needs, *(self._stored if fields is None else fields)}
        kept = {name: feature for name, feature in self._stored.items() if name in chosen}
        self._parser = RecordParser(kept)
        self._cache: BoundedCache[dict[str, Any]] | None = None
        if cache:
            self._cache = BoundedCache(CACHE_BYTES, 0, _bytes_of, drops=False)
        self.tally = Tally()
        self._unused: frozenset[int] = frozenset()

    def leave_out(self, places: Collection[int]) -> None:
        """Passes over these records too: their pictures, which are not read here, were found to be damaged."""
        self._unused |= frozenset(places)

    def require(self, num: int, option: str = "--num") -> None:
        """Raises UserError if the split has fewer records than a command was asked for by an option."""
        if num > len(self):
            raise UserError(f"{self._split} has {spell_count(len(self), 'record')}, fewer than {option}={num}")

    def __len__(self) -> int:
        return len(self._source)

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes of each field that holds the number of one."""
        return {
            name: tuple(feature.names)
            for name, feature in self._stored.items()
            if isinstance(feature, tfds.features.ClassLabel)
        }

    @property
    def image_field(self) -> str:
        """The name of the field of pictures; "" where they are not read."""
        return self._image or ""

    @property
    def has_captions(self) -> bool:
        """Whether there is a field of captions; a record may still have none."""
        return self._text is not None

    @property
    def damaged(self) -> set[int]:
        """The places of records that could not be read so far."""
        return self.tally.places(DAMAGED)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns record `index` as {"image": uint8 [h w 3], "captions": tuple of str, none blank, "place", ...}."""
        if self._cache is None:
            return self._read(index)
        record = self._cache.get(index)
        if record is None:
            record = self._read(index)
            self._cache.put(index, record)
        return record

    def require_fields(self, needs: Collection[str]) -> None:
        """Raises UserError unless there are the fields that hold what is needed; see `needs` of the class."""
        for field in needs:
            if field == CAPTIONS and self._text is None:
                raise no_captions(self._stored, self._dataset)
            if field != CAPTIONS and field not in self.class_names:
                known = ", ".join(sorted(self.class_names)) or "none"
                raise UserError(
                    f"dataset {self._dataset} has no class number in its field {field!r} (fields of class numbers: "
                    f"{known}); set config.data.label_field"
                )

    def _read(self, index: int) -> dict[str, Any]:
        why = ""
        for attempt in range(len(self)):
            place = (index + attempt) % len(self)
            if place in self._unused:
                why = "is damaged"
                continue
            try:
                record = self._decode(self._fetch(place))
                why = lacks(record, self._needs)
                if not why:
                    return {**record, PLACE: place}
            except (OSError, ValueError, PictureError) as error:  # of the reader of records and of pictures
                why = f"cannot be read ({error})"
                self._pass_over(DAMAGED, place, why)
            else:
                self._pass_over(INCOMPLETE, place, why)
        raise UserError(
            f"no record of {self._dataset} ({self._split}) can be used: the last of them {why}; choose another split, "
            "or prepare the dataset again"
        )

    def _decode(self, raw: Any) -> dict[str, Any]:
        stored = self._parser.parse(raw)
        record = {name: value for name, value in stored.items() if name not in (self._image, self._text)}
        if self._text is not None:
            record[CAPTIONS] = captions_of(stored[self._text])
        if self._image is not None and not lacks(record, self._needs):  # what is passed over need not be decoded
            value = stored[self._image]
            record["image"] = self._read_picture(value) if isinstance(value, bytes) else as_rgb(value)
        return record

    def _pass_over(self, kind: str, place: int, why: str) -> None:
        where = f"record {place} of {self._dataset} ({self._split})"
        self.tally.add(kind, place, f"{where} {why}; the next one takes its place")

    def _fetch(self, place: int) -> Any:
        """The bytes of a record, asked for more than once unless it is known to be damaged."""
        for seconds in () if self.tally.has(DAMAGED, place) else READ_AGAIN:
            try:
                return self._bytes(place)
            except (OSError, ValueError, UserError):
                time.sleep(seconds)
        return self._bytes(place)

    def _bytes(self, place: int) -> Any:
        """The bytes of a record.

        Raises:
          ValueError: if they are damaged.
          UserError: if the file is not there, or the store that it is in does not give it.
        """
        try:
            return self._source[place]
        except RuntimeError as error:
            raise _reading_error(error, self._dataset) from error


def _bytes_of(value: Any) -> int:
    """About how much memory a decoded record takes."""
    if isinstance(value, Mapping):
        return sum(map(_bytes_of, value.values())) + 100 * len(value)
    if isinstance(value, list | tuple):
        return sum(map(_bytes_of, value)) + 50 * len(value)
    return value.nbytes if isinstance(value, np.ndarray) else len(value) if isinstance(value, str | bytes) else 8


def lacks(record: Mapping[str, Any], needs: Collection[str]) -> str:
    """What a record has not that is needed, such as "has no caption"; "" if nothing is missing."""
    for need in needs:
        if need == CAPTIONS and not record[CAPTIONS]:
            return "has no caption"
        if need != CAPTIONS and int(record[need]) < 0:  # TFDS writes -1 where the class is not public
            return f"has no class number in its field {need!r}"
    return ""


def open_records(data: ConfigDict, split: str, **options: Any) -> RecordSource:
    """The records of a split of `config.data`, in the fields that it names. Options as of `RecordSource`."""
    names = {"image_field": data.image_field, "text_field": data.text_field}
    return RecordSource(data.dataset, split, data.data_dir, **names, **options)


def first_records(data: ConfigDict, split: str, num: int, needs: Collection[str]) -> list[dict[str, Any]]:
    """The first `num` records of a split without their pictures, for a metric that needs something of each.

    Args:
      data: `config.data`.
      split: of its dataset.
      num: of records.
      needs: as of `RecordSource`.

    Returns:
      What was needed of each: `captions`, class numbers as int32 [].

    Raises:
      UserError: if there are fewer records, or one lacks what is needed: the first is named, and how many do.
    """
    source = open_records(data, split, pictures=False, captions=CAPTIONS in needs, fields=needs)
    source.require_fields(needs)
    source.require(num)
    records = [source[index] for index in range(num)]
    without = [(place, why) for place, record in enumerate(records) if (why := lacks(record, needs))]
    if without:
        place, why = without[0]
        raise UserError(
            f"record {place} of {data.dataset} {why} ({len(without)} have none); choose another split, or a metric "
            "that needs none"
        )
    return records


def first_captions(data: ConfigDict, split: str, num: int) -> tuple[str, ...]:
    """The first caption of each of the first `num` records. Raises as `first_records`."""
    return tuple(record[CAPTIONS][0] for record in first_records(data, split, num, (CAPTIONS,)))


def first_classes(data: ConfigDict, split: str, num: int) -> Int32[np.ndarray, " n"]:
    """The class number of each of the first `num` records, of `data.label_field`. Raises as `first_records`."""
    field = data.label_field
    return np.array([record[field] for record in first_records(data, split, num, (field,))], np.int32)
