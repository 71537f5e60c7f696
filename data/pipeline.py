"""From a stored dataset to numpy batches: one deterministic stream of examples, and batches of it.

The stream is a function of an index alone: shuffling, repetition and augmentation are keyed by it. A checkpoint
therefore needs no iterator state, and a run continues on any number of devices, processes, or batch size.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from grain.experimental import index_shuffle
from ml_collections import ConfigDict

from data import points
from data.pictures import open_picture, read_picture
from data.precomputed import REPLACES, StoredField
from data.preprocess import choose_caption, transform_pair
from data.records import CAPTIONS, PLACE, dataset_folder, open_records
from data.tally import TRUNCATED, Tally
from data.tokenizer import Tokenizer

Example = dict[str, np.ndarray]


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


def picture_reader(config: ConfigDict) -> Callable[[bytes], Any]:
    """How the pictures of `config.data` are read for its transform."""
    # What is kept is kept as pixels, which take less; otherwise Pillow's image is spared a copy.
    return functools.partial(
        read_picture if config.cache else open_picture,
        size=transform_pair(config.transform).draft_side(config.image_size) if config.draft else 0,
    )


class ExampleStream:
    """The endless, index-determined stream of training examples, or one pass over an evaluation split.

    `stream[i]` is a dict with `image` uint8 [H W C], `index` int32 [] (i modulo 2^31), with a tokenizer `text` int32
    [L], and with a `label_field` `label` int32 []. What is precomputed stands in place of the picture.
    """

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer | None, *, split: str, seed: int, train: bool):
        """Builds the stream.

        Args:
          config: `config.data`: dataset, data_dir, image_field, text_field, label_field, image_size, transform,
            draft, text_length, bpe_dropout, cache; and the folder of what is precomputed, if anything is.
          tokenizer: encodes captions; None leaves text out.
          split: the split to read.
          seed: of shuffling and augmentation.
          train: shuffle and repeat, choose captions and crops at random. Otherwise records come in stored order,
            repeated too, with the first caption and what evaluation does with pictures in place of the transform.

        Raises:
          UserError: if the dataset is not prepared, or has no such split, pictures, captions or class numbers, or what
            is precomputed is of something else.
        """
        self._label = config.label_field
        needs = ((CAPTIONS,) if tokenizer is not None else ()) + ((self._label,) if self._label else ())
        folders = {name: Path(config[name]) for name in REPLACES if config.get(name, "")}
        self._pictures = "image" not in {REPLACES[name] for name in folders}
        pair = transform_pair(config.transform)
        self.source = open_records(
            config,
            split,
            cache=config.cache,
            pictures=self._pictures,
            captions=tokenizer is not None,
            fields=(),
            needs=needs,
            read=picture_reader(config),
        )
        self._size = config.image_size
        self._length = config.text_length
        self._dropout = config.bpe_dropout if train else 0.0
        self._tokenizer = tokenizer
        self._train = train
        self._transform = pair.training if train else pair.evaluation
        # Making a generator takes longer than all else about an example that is kept: only for what draws from it.
        random = self._pictures and pair.training is not pair.evaluation
        self._draws = train and (random or tokenizer is not None)
        self._stored = {
            name: StoredField.open(folder, config, split, self._transform.__name__, len(self.source))
            for name, folder in folders.items()
        }
        for field in self._stored.values():
            self.source.leave_out(field.damaged)
        self._seed = seed
        self._recipe = (config, tokenizer, split, seed, train)
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

    def __reduce__(self) -> tuple[Callable[..., "ExampleStream"], tuple[Any, ...]]:
        """Another process opens the dataset itself."""
        return _rebuild, self._recipe

    @property
    def tally(self) -> Tally:
        """What was passed over or cut so far."""
        return self.source.tally

    def place(self, index: int) -> int:
        """Returns which record example `index` is made of; every epoch has each record once."""
        epoch, place = divmod(index, len(self.source))
        if not self._train:
            return place
        return index_shuffle(place, max_index=len(self.source) - 1, seed=(self._order_seed + epoch) % 2**32, rounds=4)

    def __getitem__(self, index: int) -> Example:
        place = self.place(index)
        record = self.source[place]
        rng = np.random.default_rng((self._seed, index)) if self._draws else None
        epoch = index // len(self.source)
        example: Example = {name: field.row(record[PLACE], epoch) for name, field in self._stored.items()}
        if self._pictures:
            example["image"] = self._transform(record["image"], self._size, rng)
        example["index"] = np.int32(index % 2**31)
        if self._tokenizer is not None:
            caption = choose_caption(record[CAPTIONS], rng)
            ids, truncated = self._tokenizer.encode(caption, self._length, self._dropout, rng)
            if truncated:
                self.tally.add(TRUNCATED, place, f"caption cut to {self._length} tokens: {caption!r}")
            example["text"] = ids
        if self._label:
            example["label"] = np.asarray(record[self._label], np.int32)
        return example

    def batch(self, indices: Sequence[int]) -> Example:
        """Returns the examples of these indices, stacked."""
        examples = [self[index] for index in indices]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _rebuild(config: ConfigDict, tokenizer: Tokenizer | None, split: str, seed: int, train: bool) -> ExampleStream:
    return ExampleStream(config, tokenizer, split=split, seed=seed, train=train)


Stream = ExampleStream | points.PointStream


def open_stream(config: ConfigDict, tokenizer: Tokenizer | None, *, split: str, seed: int, train: bool) -> Stream:
    """The stream of a dataset: stored, or of points that are made on the fly. Arguments as of `ExampleStream`."""
    if points.is_points(config.dataset):
        return points.PointStream(config.dataset, split, seed)
    return ExampleStream(config, tokenizer, split=split, seed=seed, train=train)
