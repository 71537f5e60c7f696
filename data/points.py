"""Distributions of points in the plane, made on the fly: what a diffusion can be watched on."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from cli.errors import UserError
from data.tally import Tally

PREFIX = "points/"  # of the names of such datasets


def is_points(dataset: str) -> bool:
    """Whether a dataset's name is of points, which are no pictures and are stored nowhere."""
    return dataset.startswith(PREFIX)


_SPLITS = {"train": 0, "validation": 1}


def swiss_roll(rng: np.random.Generator, count: int) -> Float[np.ndarray, "{count} 2"]:
    """Points of a spiral of one and a half turns with a little noise, of deviation about 1 in each direction.

    The two dimensions of the roll that Sohl-Dickstein et al. 2015 show in figure 1; noise 0.05 where the outer turn has
    a radius of about 2.
    """
    angle = 1.5 * math.pi * (1 + 2 * rng.uniform(size=count))
    roll = np.stack([np.cos(angle), np.sin(angle)], axis=1) * angle[:, None]
    return roll / 7 + 0.05 * rng.standard_normal((count, 2))


def eight_gaussians(rng: np.random.Generator, count: int) -> Float[np.ndarray, "{count} 2"]:
    """Points of eight Gaussians of deviation 0.15 on a circle of radius 1.5."""
    angle = 2 * math.pi * rng.integers(8, size=count) / 8
    return 1.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.15 * rng.standard_normal((count, 2))


def checkerboard(rng: np.random.Generator, count: int) -> Float[np.ndarray, "{count} 2"]:
    """Points of the dark squares of a 4 x 4 board on [-2, 2]."""
    column, row = rng.integers(4, size=count), rng.integers(2, size=count)
    corner = np.stack([column - 2, 2 * row - 2 + column % 2], axis=1)
    return corner + rng.uniform(size=(count, 2))


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "swiss_roll": swiss_roll,
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
}

_BLOCK = 1024  # points that are drawn together, as a generator takes longer to make than to use


class PointStream:
    """The endless stream of points: `stream[i]` is {"point": float32 [2], "index": int32 []}, a function of i alone."""

    epoch_size = 2**31 - 1
    tally = Tally()  # of nothing
    classes = 0

    def pass_batches(self, batch_size: int) -> int:
        """Number of whole batches in one pass, which nobody ends."""
        return self.epoch_size // batch_size

    def __init__(self, dataset: str, split: str, seed: int):
        """Chooses a distribution.

        Args:
          dataset: "points/" and a key of `DISTRIBUTIONS`.
          split: "train" or "validation", which have no point in common.
          seed: of the points.

        Raises:
          UserError: if there is no such distribution or split.
        """
        name = dataset.removeprefix(PREFIX)
        if name not in DISTRIBUTIONS:
            raise UserError(f"unknown dataset {dataset!r}; choose {PREFIX} and one of {', '.join(DISTRIBUTIONS)}")
        if split not in _SPLITS:
            raise UserError(f"dataset {dataset} has no split {split!r}; it has {', '.join(_SPLITS)}")
        self._seed = (seed, _SPLITS[split])
        self._block = functools.lru_cache(maxsize=64)(functools.partial(self._draw, DISTRIBUTIONS[name]))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        block, place = divmod(index, _BLOCK)
        return {"point": self._block(block)[place], "index": np.asarray(index % 2**31, np.int32)}

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the examples of these indices, stacked."""
        examples = [self[index] for index in indices]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    def _draw(self, distribution: Callable[[np.random.Generator, int], np.ndarray], block: int) -> np.ndarray:
        return distribution(np.random.default_rng((*self._seed, block)), _BLOCK).astype(np.float32)
