"""Aspect-ratio buckets: batches of pictures of one shape each, in an order that is a function of an index.

Each picture belongs to the bucket that cuts least of it (NovelAI 2022, "Aspect ratio bucketing"). A bucket is an
endless stream of its own pictures, every one of them once an epoch, shuffled anew for each. Batches take it piece by
piece, so what is left of an epoch is the beginning of a batch of the next one: no picture is passed over, and after e
epochs of the whole each was seen e times, but for less than a batch of its bucket. In an epoch of the whole, bucket b
of n_b pictures has as many batches as make floor((e + 1) n_b / B) since the first epoch, in an order that is shuffled
over all buckets. Batch k holds the examples k B to (k + 1) B - 1; it depends on k and the batch size B alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

Shape = tuple[int, int]  # height, width

_MANY = 2**14  # pictures: of fewer, the shuffle of an index takes longer than a list of all


def choose_buckets(sizes: Int[np.ndarray, "n 2"], shapes: Sequence[Shape]) -> Int[np.ndarray, " n"]:
    """The number of each picture's bucket.

    It is the one that keeps most of the picture, which is scaled to cover it and cut; of several that keep as much,
    the largest that does not enlarge the picture, or else the smallest.

    Args:
      sizes: heights and widths.
      shapes: of the buckets.
    """
    aspects = sizes[:, 1] / sizes[:, 0]
    ranks = []
    for height, width in shapes:
        ratio = aspects * height / width
        kept = np.round(np.minimum(ratio, 1 / ratio), 6)
        enlarges = (sizes[:, 0] < height) | (sizes[:, 1] < width)
        area = height * width
        ranks.append(np.stack([kept, ~enlarges, np.where(enlarges, -area, area)], axis=-1))
    stacked = np.stack(ranks, axis=1)  # [n buckets 3], the first key counts most
    best = np.zeros(len(sizes), np.int64)
    for bucket in range(1, len(shapes)):
        ours, rival = stacked[np.arange(len(sizes)), best], stacked[:, bucket]
        first = np.argmax(ours != rival, axis=1)[:, None]
        better = np.take_along_axis(rival, first, 1) > np.take_along_axis(ours, first, 1)
        best = np.where(better[:, 0], bucket, best)
    return best


class BucketOrder:
    """Which picture each example is made of, and which shape each batch has.

    Attributes:
      pass_batches: whole batches of one pass over the pictures.
    """

    def __init__(self, buckets: Int[np.ndarray, " n"], batch_size: int, seed: int, shuffle: bool):
        """Makes the order.

        Args:
          buckets: the number of each picture's bucket.
          batch_size: B, of a batch over all processes.
          seed: of the order.
          shuffle: pictures too. Otherwise those of a bucket come in stored order, and batches alone are shuffled, so
            that the first few are of all buckets.
        """
        self._recipe = (buckets, batch_size, seed, shuffle)
        self._members = {int(bucket): np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)}
        self._batch_size, self._total, self._shuffle = batch_size, len(buckets), shuffle
        self._seeds = {name: _seed(seed, name) for name in (*self._members, "batches")}
        self.pass_batches = max(1, self._before(1))
        self._batch = functools.lru_cache(maxsize=64)(self._find_batch)

    def __reduce__(self) -> tuple[type["BucketOrder"], tuple[Any, ...]]:
        """Another process makes it again."""
        return BucketOrder, self._recipe

    def bucket(self, index: int) -> int:
        """The bucket of example `index`, and of all others of its batch."""
        return self._batch(index // self._batch_size)[0]

    def place(self, index: int) -> int:
        """The picture that example `index` is made of."""
        batch, row = divmod(index, self._batch_size)
        bucket, number = self._batch(batch)
        members = self._members[bucket]
        epoch, place = divmod(number * self._batch_size + row, len(members))
        if self._shuffle:
            place = _shuffled(place, len(members), self._seeds[bucket] + epoch)
        return int(members[place])

    def _before(self, epoch: int) -> int:
        """Batches of all epochs before this one."""
        return sum(epoch * len(members) // self._batch_size for members in self._members.values())

    def _find_batch(self, batch: int) -> tuple[int, int]:
        """Its bucket, and its number among the batches of that bucket."""
        epoch = batch * self._batch_size // self._total  # or a later one: the rests of batches come later
        while self._before(epoch + 1) <= batch:
            epoch += 1
        start = self._before(epoch)
        place = _shuffled(batch - start, self._before(epoch + 1) - start, self._seeds["batches"] + epoch)
        for bucket, members in self._members.items():
            first, last = (e * len(members) // self._batch_size for e in (epoch, epoch + 1))
            if place < last - first:
                return bucket, first + place
            place -= last - first
        raise AssertionError("the batches of an epoch are those of its buckets")


def shapes_of(shapes: Any) -> tuple[Shape, ...]:
    """`config.data.buckets` as pairs of numbers."""
    return tuple((int(height), int(width)) for height, width in shapes)


def cut_to(size: Shape, shape: Shape) -> Shape:
    """The height and width of the largest part of a picture of `size` that has the aspect ratio of `shape`."""
    (height, width), (tall, wide) = size, shape
    if width * tall > wide * height:
        return height, min(width, max(1, round(height * wide / tall)))
    return min(height, max(1, round(width * tall / wide))), width


def _seed(seed: int, name: int | str) -> int:
    number = 2 if name == "batches" else 3 + int(name)
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _shuffled(place: int, count: int, seed: int) -> int:
    if count >= _MANY:
        return index_shuffle(place, max_index=count - 1, seed=seed % 2**32, rounds=4)
    return int(_permutation(count, seed)[place])


@functools.lru_cache(maxsize=256)
def _permutation(count: int, seed: int) -> Int[np.ndarray, " {count}"]:
    """An order of a few things; of raw bits, which no version of numpy makes others of."""
    return np.argsort(np.random.Philox(seed).random_raw(count), kind="stable")
