"""From a stored dataset to numpy batches: one deterministic stream of examples, batches by row, read ahead by threads.

The stream is a function of an index alone: shuffling, repetition and augmentation are keyed by it. A checkpoint
therefore needs no iterator state, and a run continues on any number of devices, processes, or batch size.
"""

import collections
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from grain.experimental import index_shuffle
from jaxtyping import Int32
from ml_collections import ConfigDict

from cli.errors import UserError
from data import points, scenes
from data.pictures import PictureError, read_picture
from data.preprocess import choose_caption, transform_pair
from data.tokenizer import Tokenizer

Example = dict[str, np.ndarray]

CAPTION_FIELDS = ("captions", "caption", "text")  # where datasets keep them; the first of these that is there

READ_AGAIN = (0.1, 1.0)  # seconds to wait before a record that could not be read is read again

DEFAULT_DATA_DIR: str = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")  # as TFDS itself has it

# TFDS suggests OpenCV for every source it opens; Pillow is enough.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def dataset_folder(dataset: str, data_dir: str | None) -> Path:
    """Returns the folder of a prepared dataset, such as `scenes/single32`, in its newest version.

    Args:
      dataset: a TFDS name, `dataset[/config]`.
      data_dir: where datasets are kept; None or "" for TFDS's own default.

    Raises:
      UserError: if it was not prepared.
    """
    root = Path(data_dir or DEFAULT_DATA_DIR).expanduser()
    versions = [path.parent for path in (root / dataset).glob("*/dataset_info.json")]
    if not versions:
        raise UserError(f"dataset {dataset} is not in {root}; {_how_to_prepare(dataset, data_dir)}")
    return max(versions, key=lambda path: [int(number) for number in path.name.split(".")])


def _how_to_prepare(dataset: str, data_dir: str | None) -> str:
    """What prepares a dataset: the project's command for its own, TFDS for all others."""
    if dataset in known_datasets():
        return f"run `python -m scripts.prepare --dataset={dataset}{f' --data_dir={data_dir}' if data_dir else ''}`"
    if dataset.split("/")[0] == "scenes":
        return f"choose one of {', '.join(known_datasets())}"
    arguments = [repr(dataset), *([f"data_dir={data_dir!r}"] if data_dir else []), "file_format='array_record'"]
    command = f"tensorflow_datasets.builder({', '.join(arguments)}).download_and_prepare()"
    return f"prepare it in Python with `{command}` (most datasets need TensorFlow for that)"


def batch_spec(config: ConfigDict) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What a batch of RGB pictures (or points) holds, told from its config alone: no dataset is opened.

    Args:
      config: `config.data`, as `open_stream` takes it; text is there where `text_length` is positive, label where
        `label_field` is named.

    Returns:
      name -> (shape of one example, dtype), in the order of the stream.
    """
    if points.is_points(config.dataset):
        return {"point": ((2,), np.dtype(np.float32)), "index": ((), np.dtype(np.int32))}
    size, length = config.image_size, config.text_length
    spec: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "image": ((size, size, 3), np.dtype(np.uint8)),
        "index": ((), np.dtype(np.int32)),
    }
    if length:
        spec["text"] = ((length,), np.dtype(np.int32))
    if config.label_field:
        spec["label"] = ((), np.dtype(np.int32))
    return spec


def load_tokenizer(config: ConfigDict) -> Tokenizer:
    """Returns the tokenizer that a config asks for.

    Args:
      config: `config.data`: `tokenizer` is the path of a CLIP vocabulary, or "" for the tokenizer that was trained on
        the dataset's captions and is stored with it; `text_ends` frames captions, as CLIP's vocabulary always does.

    Raises:
      UserError: if there is none.
    """
    if config.tokenizer:
        tokenizer = Tokenizer.from_clip_vocabulary(config.tokenizer)
    else:
        tokenizer = Tokenizer.load(dataset_folder(config.dataset, config.data_dir) / "tokenizer.json")
    return tokenizer.with_ends() if config.text_ends else tokenizer


class RecordSource:
    """Random access to one split's records: pictures as `read_picture` reads them, captions as str.

    A record that cannot be decoded, or read in a few attempts, is replaced by the next one and counted in `damaged`, so
    that one bad file does not end a run of days, and a storage that fails for a moment does not change the stream.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        data_dir: str | None = None,
        cache: bool = False,
        pictures: bool = True,
        fields: Collection[str] | None = None,
    ):
        """Opens a split.

        Args:
          dataset: TFDS name.
          split: TFDS split expression, such as `train` or `train[:90%]`.
          data_dir: see `dataset_folder`.
          cache: keep decoded records in memory once read; for datasets that fit there.
          pictures: decode `image`; otherwise it is left as the bytes of its file, as any other field of pictures is.
          fields: names of the stored fields to decode, where the dataset has them; None for all. The others then cost
            neither time nor memory.

        Raises:
          UserError: if the dataset is not prepared or has no such split.
        """
        builder = tfds.builder_from_directory(dataset_folder(dataset, data_dir))
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._source = builder.as_data_source(split=split, deserialize_method=raw)  # pyright: ignore[reportCallIssue]
        except ValueError as error:
            raise UserError(
                f"dataset {dataset} has no split {split!r}; it has {', '.join(builder.info.splits)}"
            ) from error
        except NotImplementedError as error:  # what TFDS raises of its default, TFRecord, and of nothing else here
            raise UserError(
                f"dataset {dataset} in {builder.data_path} was prepared in a format without random access; move it "
                f"away and {_how_to_prepare(dataset, data_dir)}"
            ) from error
        if not len(self._source):
            raise UserError(f"split {split!r} of {dataset} is empty; prepare the dataset again")
        stored: Any = builder.info.features
        self._features = tfds.features.FeaturesDict(
            {name: stored[name] for name in stored if fields is None or name in fields}
        )
        # TFDS' own decoder takes a file's numbers for colors, whatever they stand for.
        images = [name for name, feature in self._features.items() if isinstance(feature, tfds.features.Image)]
        self._decoders = {name: tfds.decode.SkipDecoding() for name in images} or None
        self._pictures = pictures and "image" in images
        if self._pictures and self._features["image"].np_dtype == np.float32:  # stored as if they were four channels
            raise UserError(f"the pictures of {dataset} are floats, without an agreed white; prepare them as 8 bits")
        self._cache: dict[int, dict[str, Any]] | None = {} if cache else None
        self._lock = threading.Lock()
        self._dataset, self._split = dataset, split
        self.damaged: set[int] = set()

    def require(self, num: int, option: str = "--num") -> None:
        """Raises UserError if the split has fewer records than a command was asked for by an option."""
        if num > len(self):
            raise UserError(f"{self._split} has {len(self)} records, fewer than {option}={num}")

    def __len__(self) -> int:
        return len(self._source)

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes of each field that holds the number of one."""
        return {
            name: tuple(feature.names)
            for name, feature in self._features.items()
            if isinstance(feature, tfds.features.ClassLabel)
        }

    @property
    def has_captions(self) -> bool:
        """Whether there is a field of captions; a record may still have none."""
        return any(name in self._features for name in CAPTION_FIELDS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns record `index` as {"image": uint8 [h w 3], "captions": tuple of str, ...}."""
        if self._cache is None:
            return self._read(index)
        record = self._cache.get(index)
        if record is None:
            record = self._cache[index] = self._read(index)
        return record

    def _read(self, index: int) -> dict[str, Any]:
        for attempt in range(len(self)):
            place = (index + attempt) % len(self)
            try:
                raw = self._fetch(place)
                record: Any = self._features.deserialize_example_np(raw, decoders=self._decoders)
                if self._pictures:
                    record["image"] = read_picture(record["image"])
            except (OSError, ValueError, PictureError) as error:  # of the reader of records and of pictures
                with self._lock:
                    first = not self.damaged
                    self.damaged.add(place)
                if first:
                    where = f"record {place} of {self._dataset} ({self._split})"
                    print(f"warning: {where} cannot be read ({error}); the next one takes its place", flush=True)
                continue
            record["captions"] = _captions(record)
            return record
        raise UserError(f"no record of {self._dataset} ({self._split}) can be read; prepare the dataset again")

    def _fetch(self, place: int) -> Any:
        """The bytes of a record, asked for more than once unless it is known to be damaged."""
        for seconds in () if place in self.damaged else READ_AGAIN:
            try:
                return self._source[place]
            except (OSError, ValueError):
                time.sleep(seconds)
        return self._source[place]


def _captions(record: Mapping[str, Any]) -> tuple[str, ...]:
    """All captions of a record, which has one, several, or (COCO) a table with a column `text` of them."""
    captions = next((record[name] for name in CAPTION_FIELDS if name in record), ())
    if isinstance(captions, Mapping):
        captions = captions.get("text", ())
    captions = [captions] if isinstance(captions, str | bytes) else captions
    return tuple(c.decode("utf-8", "replace") if isinstance(c, bytes) else str(c) for c in captions)


def class_number(record: Mapping[str, Any], field: str) -> Int32[np.ndarray, ""]:
    """The number of a record's class.

    Raises:
      UserError: if the record has no such field, or no class: TFDS writes -1 where the class is not public.
    """
    number = np.asarray(record.get(field, -1), np.int32)
    if number.ndim or number < 0:
        raise UserError(f"a record has no class number in its field {field!r}; choose another split or label_field")
    return number


class ExampleStream:
    """The endless, index-determined stream of training examples, or one pass over an evaluation split.

    `stream[i]` is a dict with `image` uint8 [H W C], `index` int32 [] (i modulo 2^31), with a tokenizer `text` int32
    [L], and with a `label_field` `label` int32 [].
    """

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer | None, *, split: str, seed: int, train: bool):
        """Builds the stream.

        Args:
          config: `config.data`: dataset, data_dir, image_size, transform, text_length, bpe_dropout, label_field, cache.
          tokenizer: encodes captions; None leaves text out.
          split: the split to read.
          seed: of shuffling and augmentation.
          train: shuffle and repeat, choose captions and crops at random. Otherwise records come in stored order,
            repeated too, with the first caption and what evaluation does with pictures in place of the transform.

        Raises:
          UserError: if the dataset is not prepared, or has no such split or class numbers.
        """
        self._label = config.label_field
        fields = {"image", self._label} if tokenizer is None else {"image", self._label, *CAPTION_FIELDS}
        self.source = RecordSource(config.dataset, split, config.data_dir, config.cache, fields=fields)
        if self._label and self._label not in self.source.class_names:
            known = ", ".join(sorted(RecordSource(config.dataset, split, config.data_dir).class_names)) or "none"
            raise UserError(
                f"dataset {config.dataset} has no field {self._label!r} of class numbers (it has: {known}); set "
                "config.data.label_field"
            )
        self._size = config.image_size
        self._length = config.text_length
        self._dropout = config.bpe_dropout if train else 0.0
        self._tokenizer = tokenizer
        self._train = train
        pair = transform_pair(config.transform)
        self._transform = pair.training if train else pair.evaluation
        # Making a generator takes longer than all else about an example that is kept: only for what draws from it.
        self._draws = train and (pair.training is not pair.evaluation or tokenizer is not None)
        self._lock = threading.Lock()
        self.truncated = 0
        self._seed = seed
        # The order of `grain.MapDataset.seed(seed).shuffle().repeat()`, without the statistics it keeps of each read.
        self._order_seed = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])

    @property
    def epoch_size(self) -> int:
        """Number of records in one pass."""
        return len(self.source)

    @property
    def classes(self) -> int:
        """Number of classes that a label may name; 0 without labels."""
        return len(self.source.class_names[self._label]) if self._label else 0

    @property
    def damaged(self) -> int:
        """Number of records that could not be read so far."""
        return len(self.source.damaged)

    def place(self, index: int) -> int:
        """Returns which record example `index` is made of; every epoch has each record once."""
        epoch, place = divmod(index, len(self.source))
        if not self._train:
            return place
        return index_shuffle(place, max_index=len(self.source) - 1, seed=(self._order_seed + epoch) % 2**32, rounds=4)

    def __getitem__(self, index: int) -> Example:
        record = self.source[self.place(index)]
        rng = np.random.default_rng((self._seed, index)) if self._draws else None
        image = self._transform(record["image"], self._size, rng)
        example: Example = {"image": image, "index": np.int32(index % 2**31)}
        if self._tokenizer is not None:
            caption = choose_caption(record["captions"], rng)
            ids, truncated = self._tokenizer.encode(caption, self._length, self._dropout, rng)
            if truncated:
                with self._lock:
                    if not self.truncated:
                        print(f"warning: caption cut to {self._length} tokens: {caption!r}", flush=True)
                    self.truncated += 1
            example["text"] = ids
        if self._label:
            example["label"] = class_number(record, self._label)
        return example

    def batch(self, indices: Sequence[int]) -> Example:
        """Returns the examples of these indices, stacked."""
        examples = [self[index] for index in indices]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


Stream = ExampleStream | points.PointStream


def open_stream(config: ConfigDict, tokenizer: Tokenizer | None, *, split: str, seed: int, train: bool) -> Stream:
    """The stream of a dataset: stored, or of points that are made on the fly. Arguments as of `ExampleStream`."""
    if points.is_points(config.dataset):
        return points.PointStream(config.dataset, split, seed)
    return ExampleStream(config, tokenizer, split=split, seed=seed, train=train)


class BatchReader(Iterator[Example]):
    """Batches of a stream, for the rows that one process feeds, read ahead by threads.

    Row r of the global batch that follows `examples_seen` examples is `stream[examples_seen + r]`.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        batch_size: int,
        rows: Sequence[int],
        examples_seen: int,
        workers: int = 1,
        read_ahead: int = 4,
    ):
        """Starts reading.

        Args:
          stream: where examples come from.
          batch_size: of the global batch.
          rows: the rows of the global batch to read here, in the order wanted.
          examples_seen: where to begin.
          workers: threads that read.
          read_ahead: batches kept ready.
        """
        self._stream = stream
        self._batch_size = batch_size
        self._rows = tuple(rows)
        self._next = examples_seen
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="data")
        self._ready: collections.deque[Future[Example]] = collections.deque()
        for _ in range(max(1, read_ahead)):
            self._submit()

    def __next__(self) -> Example:
        batch = self._ready.popleft().result()
        self._submit()
        return batch

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        indices = [self._next + row for row in self._rows]
        self._next += self._batch_size
        self._ready.append(self._pool.submit(self._stream.batch, indices))


def known_datasets() -> tuple[str, ...]:
    """Names of the datasets that `scripts.prepare` can make without the internet."""
    return tuple(f"scenes/{name}" for name in scenes.WORLDS)
