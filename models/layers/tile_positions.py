"""Learned positions of the tiles that a picture is cut into: of each canvas, an arrangement of tiles, its own.

Canvases are numbered as `canvases` lists them, from 1 on; 0 is no picture.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

TABLES = ("canvases", "grid")


def canvases(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, columns) of at most so many tiles: number i + 1 is entry i."""
    return tuple((rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1))


def tiles_of_canvases(max_tiles: int) -> Int[np.ndarray, "c"]:
    """How many tiles each number of a canvas has; of no picture one, which is black."""
    return np.array([1, *(rows * columns for rows, columns in canvases(max_tiles))], np.int32)


def spread_grid(grid: Float[Array, "t t *rest"]) -> Float[Array, "c t *rest"]:
    """Tables of all canvases from one grid: canvas (h, w) has its first h rows and w columns, and zeros behind."""
    side = grid.shape[0]
    tables = [jnp.zeros_like(grid[0])]
    for rows, columns in canvases(side):
        table = grid[:rows, :columns].reshape(rows * columns, *grid.shape[2:])
        tables.append(jnp.pad(table, ((0, side - len(table)), *((0, 0),) * (grid.ndim - 2))))
    return jnp.stack(tables)


class TilePositions(nn.Module):
    """A learned array for each tile of each canvas.

    Attributes:
      max_tiles: tiles of a picture at most, T.
      shape: of the array of one tile.
      tables: "canvases" for a table of each canvas, which is how transformers stores them; "grid" for one of T x T
        tiles, of which each canvas has the upper left corner, as in the published code (see `spread_grid`).
      embedding_init: initializer.
      dtype: of the result.
      param_dtype: of the parameters.

    Raises:
      ValueError: when called, if there are no such tables.
    """

    max_tiles: int
    shape: tuple[int, ...]
    tables: str = "canvases"
    embedding_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, canvas: Int[Array, "b"]) -> Float[Array, "b t *rest"]:
        """The arrays of a picture's tiles.

        Args:
          canvas: its number.
        """
        if self.tables not in TABLES:
            raise ValueError(f"unknown tables {self.tables!r} of tiles; choose one of {', '.join(TABLES)}")
        if self.tables == "grid":
            shape = (self.max_tiles, self.max_tiles, *self.shape)
            tables = spread_grid(self.param("grid", self.embedding_init, shape, self.param_dtype))
        else:
            shape = (len(canvases(self.max_tiles)) + 1, self.max_tiles, *self.shape)
            tables = self.param("embedding", self.embedding_init, shape, self.param_dtype)
        return tables[canvas].astype(self.dtype)
