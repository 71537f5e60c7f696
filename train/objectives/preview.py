"""From arrays on devices to what previews show: numpy, whole on every process."""

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Shaped

from sample.sheets.grid import to_uint8


def gather(rows: Shaped[Array, "b *s"]) -> np.ndarray:
    """An array in numpy, the whole batch on every process: a collective call."""
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def to_host(images: Float[Array, "b h w c"]) -> np.ndarray:
    """Images in [-1, 1] as bytes in numpy, the whole batch on every process: a collective call.

    What is no number is black, what is infinite black or white: a preview ends no run; `train.health` does that, and
    says why.
    """
    return to_uint8(np.nan_to_num(gather(images), nan=-1.0, posinf=1.0, neginf=-1.0))
