"""From a stored dataset to numpy batches: one deterministic stream of examples, and batches of it.

The stream is a function of an index alone: shuffling, repetition and augmentation are keyed by it. A checkpoint
therefore needs no iterator state, and a run continues on any number of devices, processes, or batch size.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from grain.experimental import index_shuffle
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import locate, locate_from_home
from data import points
from data.buckets import BucketOrder, choose_buckets, shapes_of
from data.dialogues import ABOUT_SCENES, check_dialogues, encode_dialogue, make_dialogue
from data.llama_tokenizer import LlamaTokenizer
from data.picture_sizes import picture_sizes
from data.pictures import load_picture, read_picture
from data.precomputed import MADE_OF, StoredField
from data.preprocess import TRANSFORMS, choose_caption, transform_pair
from data.records import CAPTIONS, PLACE, dataset_folder, open_records
from data.tally import TRUNCATED, Tally
from data.tiles import picture_fields
from data.tokenizer import Tokenizer

Example = dict[str, np.ndarray]


def batch_spec(config: ConfigDict) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What a batch of RGB pictures (or points) holds, told from its config alone: no dataset is opened.

    Args:
      config: `config.data`, as `open_stream` takes it; text is there where `text_length` is positive, label where
        `label_field` is named.

    Returns:
      name -> (shape of one example, dtype), in the order of the stream; where batches have several shapes, of the
      largest.
    """
    if points.is_points(config.dataset):
        return {"point": ((2,), np.dtype(np.float32)), "index": ((), np.dtype(np.int32))}
    length = config.text_length
    tiles = config.get("max_tiles", 1)
    shape = (*max(picture_shapes(config), key=math.prod), 3)
    spec: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "image": ((tiles, *shape) if tiles > 1 else shape, np.dtype(np.uint8)),
        **({"canvas": ((), np.dtype(np.int32))} if tiles > 1 else {}),
        "index": ((), np.dtype(np.int32)),
    }
    if length:
        spec["text"] = ((length,), np.dtype(np.int32))
        if config.get("dialogues", ""):
            spec["text_mask"] = ((length,), np.dtype(bool))
        if config.get("writes_with", ""):
            spec["written"] = ((config.written_length,), np.dtype(np.int32))
    if config.label_field:
        spec["label"] = ((), np.dtype(np.int32))
    return spec


def picture_shapes(config: ConfigDict) -> tuple[tuple[int, int], ...]:
    """The heights and widths that pictures of a batch may have, those of `config.data.buckets` or one square."""
    return shapes_of(config.buckets) or ((config.image_size, config.image_size),)


def load_tokenizer(config: ConfigDict) -> Tokenizer:
    """Returns the tokenizer that a config asks for.

    Args:
      config: `config.data`: `tokenizer` is the path of a CLIP vocabulary, or of a run's tokenizer.json, or "" for the
        tokenizer that was trained on the dataset's captions and is stored with it; `text_ends` frames captions, as
        CLIP's vocabulary always does, and those of Llama 3's as turns of a conversation.

    Raises:
      UserError: if there is none.
    """
    if config.tokenizer.endswith(".json"):
        tokenizer = Tokenizer.load(locate_from_home(config.tokenizer))
    elif config.tokenizer:
        tokenizer = Tokenizer.from_clip_vocabulary(config.tokenizer)
    else:
        tokenizer = Tokenizer.load(dataset_folder(config.dataset, config.data_dir) / "tokenizer.json")
    return tokenizer.with_ends() if config.text_ends else tokenizer


def load_writer(config: ConfigDict) -> Tokenizer | None:
    """Returns the tokenizer `config.data.writes_with`, of a captioner that writes with another one than it reads.

    Raises:
      UserError: if it is missing, or its captions have no end.
    """
    if not config.get("writes_with", ""):
        return None
    writer = Tokenizer.load(locate_from_home(config.writes_with))
    if writer.end_id is None or (isinstance(writer, LlamaTokenizer) and writer.in_turns):
        raise UserError(f"config.data.writes_with={config.writes_with} does not end captions; give one that does")
    return writer


def picture_reader(config: ConfigDict) -> Callable[[bytes], Any]:
    """How the pictures of `config.data` are read for its transform."""
    # Which of its shapes a picture will get, its bytes do not say; and a canvas is chosen by the whole picture's size.
    longest = max(map(max, picture_shapes(config)))
    draft = config.draft and config.get("max_tiles", 1) == 1
    # What is kept is kept as pixels, which take less; otherwise Pillow's image is spared a copy.
    return functools.partial(
        read_picture if config.cache else load_picture,
        size=transform_pair(config.transform).draft_side(longest) if draft else 0,
    )


class ExampleStream:
    """The endless, index-determined stream of training examples, or one pass over an evaluation split.

    `stream[i]` is a dict with `image` uint8 [H W C], `index` int32 [] (i modulo 2^31), with a tokenizer `text` int32
    [L] (and of questions with answers `text_mask` bool [L], the answers' tokens), with a writer `written` int32 [M],
    and with a `label_field` `label` int32 []. What is precomputed of pictures stands in their place, what is of
    captions beside `text`. With `config.buckets` pictures have several shapes, one in each batch: see `data.buckets`.
    With `config.max_tiles` above 1 `image` is [T H W 3], and `canvas` int32 [] beside it: see `data.tiles`.
    """

    def __init__(
        self,
        config: ConfigDict,
        tokenizer: Tokenizer | None,
        *,
        split: str,
        seed: int,
        train: bool,
        batch_size: int = 0,
        order: BucketOrder | None = None,
        writer: Tokenizer | None = None,
    ):
        """Builds the stream.

        Args:
          config: `config.data`: dataset, data_dir, image_field, text_field, label_field, image_size, max_tiles,
            buckets, transform, draft, text_length, dialogues, bpe_dropout, cache; and the folder of what is
            precomputed, if anything is.
          tokenizer: encodes captions; None leaves text out.
          split: the split to read.
          seed: of shuffling and augmentation.
          train: shuffle and repeat, choose captions and crops at random. Otherwise records come in stored order,
            repeated too, with the first caption and what evaluation does with pictures in place of the transform.
          batch_size: of the batches over all processes, on which the order depends where there are buckets.
          order: of the buckets, where it is known.
          writer: encodes the same captions a second time, as `load_writer` gives it; None for none.

        Raises:
          UserError: if the dataset is not prepared, or has no such split, pictures, captions or class numbers, or what
            is precomputed is of something else, or there are buckets and the transform cuts squares.
        """
        self._label = config.label_field
        self._dialogues, self._dataset = config.get("dialogues", ""), config.dataset
        if self._dialogues:
            check_dialogues(self._dialogues, config.dataset, tokenizer)
        needs = ((CAPTIONS,) if tokenizer is not None else ()) + ((self._label,) if self._label else ())
        folders = {name: locate(config[name]) for name in MADE_OF if config.get(name, "")}
        self._pictures = "image" not in {MADE_OF[name] for name in folders}
        pair = transform_pair(config.transform)
        self._shapes, self._order = shapes_of(config.buckets), order
        if self._shapes:
            self._check_buckets(config, batch_size)
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
        self._size, self._max_tiles = config.image_size, config.get("max_tiles", 1)
        self._length = config.text_length
        self._dropout = config.bpe_dropout if train else 0.0
        self._tokenizer, self._writer = tokenizer, writer
        self._written_length = config.get("written_length", 0)
        self._train = train
        self._transform = pair.training if train else pair.evaluation
        # Making a generator takes longer than all else about an example that is kept: only for what draws from it.
        random = self._pictures and pair.training is not pair.evaluation and self._max_tiles == 1
        self._draws = train and (random or tokenizer is not None)
        of_split = {"split": split, "transform": self._transform.__name__, "records": len(self.source)}
        self._stored = {
            name: StoredField.open(name, folder, config, tokenizer, **of_split) for name, folder in folders.items()
        }
        for field in self._stored.values():
            self.source.leave_out(field.damaged)
        self._seed = seed
        if self._shapes and order is None:
            buckets = choose_buckets(picture_sizes(config, split), self._shapes)
            self._order = BucketOrder(buckets, batch_size, seed, shuffle=train)
        self._recipe = (config, tokenizer, split, seed, train, batch_size, writer)
        # The order of `grain.MapDataset.seed(seed).shuffle().repeat()`, without the statistics it keeps of each read.
        self._order_seed = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])

    @property
    def epoch_size(self) -> int:
        """Number of records in one pass."""
        return len(self.source)

    def pass_batches(self, batch_size: int) -> int:
        """Number of whole batches in one pass, at least 1."""
        return self._order.pass_batches if self._order is not None else max(1, len(self.source) // batch_size)

    @property
    def given_up(self) -> tuple[str, ...]:
        """What is drawn no more, as it was stored: a line each."""
        pair = transform_pair(self._recipe[0].transform)
        if not self._train or pair.training is pair.evaluation:
            return ()
        return tuple(
            f"config.data.{name}: {pair.training.__name__} shows a picture in {field.views} stored ways, in turn by "
            "epoch, and draws none anew"
            for name, field in self._stored.items()
            if MADE_OF[name] == "image"
        )

    @property
    def classes(self) -> int:
        """Number of classes that a label may name; 0 without labels."""
        return len(self.source.class_names[self._label]) if self._label else 0

    def __reduce__(self) -> tuple[Callable[..., "ExampleStream"], tuple[Any, ...]]:
        """Another process opens the dataset itself."""
        return _rebuild, (*self._recipe, self._order)

    @property
    def tally(self) -> Tally:
        """What was passed over or cut so far."""
        return self.source.tally

    def place(self, index: int) -> int:
        """Returns which record example `index` is made of; every epoch has each record once."""
        if self._order is not None:
            return self._order.place(index)
        epoch, place = divmod(index, len(self.source))
        if not self._train:
            return place
        return index_shuffle(place, max_index=len(self.source) - 1, seed=(self._order_seed + epoch) % 2**32, rounds=4)

    def __getitem__(self, index: int) -> Example:
        place = self.place(index)
        record = self.source[place]
        rng = np.random.default_rng((self._seed, index)) if self._draws else None
        example: Example = {}
        if self._pictures:
            shape = self._size if self._order is None else self._shapes[self._order.bucket(index)]
            example |= picture_fields(record["image"], shape, self._transform, self._max_tiles, rng)
        example["index"] = np.int32(index % 2**31)
        chosen = 0
        if self._tokenizer is not None:
            if self._dialogues:
                if rng is None and self._dialogues in ABOUT_SCENES:  # evaluation asks of all kinds too
                    rng = np.random.default_rng((0, place))
                caption = make_dialogue(self._dialogues, self._dataset, record[CAPTIONS], rng)
                ids, example["text_mask"], truncated = encode_dialogue(self._tokenizer, caption, self._length)
            else:
                chosen = choose_caption(record[CAPTIONS], rng)
                caption = record[CAPTIONS][chosen]
                ids, truncated = self._tokenizer.encode_whole(caption, self._length, self._dropout, rng)
            if truncated:
                self.tally.add(TRUNCATED, place, f"caption cut to {self._length} tokens: {caption!r}")
            example["text"] = ids
            if self._writer is not None:
                example["written"] = self._encode_written(caption, place)
        if self._label:
            example["label"] = np.asarray(record[self._label], np.int32)
        epoch = index // len(self.source)
        stored = {name: field.row(record[PLACE], epoch, chosen) for name, field in self._stored.items()}
        return {**stored, **example}

    def _encode_written(self, caption: str, place: int) -> np.ndarray:
        """A caption's ids of the second tokenizer."""
        assert self._writer is not None
        ids, truncated = self._writer.encode_whole(caption, self._written_length)
        if truncated:
            self.tally.add(TRUNCATED, place, f"caption cut to {self._written_length} tokens to write: {caption!r}")
        return ids

    def _check_buckets(self, config: ConfigDict, batch_size: int) -> None:
        """Raises UserError unless there can be buckets."""
        if not self._pictures:
            raise UserError("config.data.buckets shapes pictures, and this run reads stored fields; leave one out")
        if not transform_pair(config.transform).any_shape:
            able = ", ".join(name for name, pair in TRANSFORMS.items() if pair.any_shape)
            raise UserError(
                f"config.data.buckets asks for several shapes, and config.data.transform={config.transform!r} cuts "
                f"squares; choose one of {able}"
            )
        if batch_size < 1:
            raise ValueError("buckets need the size of batches")

    def batch(self, indices: Sequence[int]) -> Example:
        """Returns the examples of these indices, stacked."""
        return stack_examples([self[index] for index in indices])


def stack_examples(examples: Sequence[Example]) -> Example:
    """A batch of examples of the same shapes."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _rebuild(
    config: ConfigDict,
    tokenizer: Tokenizer | None,
    split: str,
    seed: int,
    train: bool,
    batch_size: int,
    writer: Tokenizer | None,
    order: BucketOrder | None,
) -> ExampleStream:
    opening = {"split": split, "seed": seed, "train": train, "batch_size": batch_size}
    return ExampleStream(config, tokenizer, **opening, order=order, writer=writer)


Stream = ExampleStream | points.PointStream


def open_stream(
    config: ConfigDict,
    tokenizer: Tokenizer | None,
    *,
    split: str,
    seed: int,
    train: bool,
    batch_size: int = 0,
    writer: Tokenizer | None = None,
) -> Stream:
    """The stream of a dataset: stored, or of points that are made on the fly. Arguments as of `ExampleStream`."""
    if points.is_points(config.dataset):
        return points.PointStream(config.dataset, split, seed)
    opening = {"split": split, "seed": seed, "train": train, "batch_size": batch_size}
    return ExampleStream(config, tokenizer, **opening, writer=writer)
