"""The image encoder of Llama 3.2 Vision: a ViT over the tiles of a picture, which are one sequence.

Dubey et al. 2024, "The Llama 3 Herd of Models", section 7.2, and the code that was published with the weights.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from models.clip import IMAGE_MEAN, IMAGE_STD
from models.layers.convolution import Conv
from models.layers.normalization import layer_norm
from models.layers.partitioning import shard_rows
from models.layers.tile_positions import TilePositions, tiles_of_canvases
from models.layers.transformer import Block, BlockInitializers, apply_blocks, check_remat

_MULTIPLE = 8  # tokens of a tile are padded to one
_INIT = nn.initializers.normal(0.02)


class TiledImageEncoder(nn.Module):
    """Features of every patch of every tile: of the last layer, and of some in between.

    Pads behind a tile, and the tiles that a picture lacks, are tokens like others to those that are none, which attend
    to them; they alone do not see each other. The published weights were trained so.

    Attributes:
      image_size: side of a tile, pixels.
      patch_size: side of a patch, pixels.
      width: D.
      heads: number of attention heads.
      layers: the first layers ("local": of all tiles too).
      global_layers: those behind, whose residual branches are gated.
      mlp_ratio: hidden width of the feed-forward blocks over D.
      max_tiles: tiles of a picture, T.
      feature_layers: layers whose states are features too.
      features_behind: the state behind such a layer is taken, as in transformers from 4.57 on, and not the one before.
      tile_tables: see `models.layers.tile_positions.TilePositions`.
      image_mean: of a channel, in 0..1.
      image_std: of a channel, in 0..1.
      implementation: see `models.layers.attention.attend`.
      scan: see `models.layers.transformer.apply_blocks`.
      remat: see there.
      dtype: of the computation; LayerNorm statistics, attention scores and softmax are float32 in any case.
      param_dtype: of the parameters.
    """

    image_size: int
    patch_size: int
    width: int
    heads: int
    layers: int
    global_layers: int
    mlp_ratio: int | float = 4
    max_tiles: int = 4
    feature_layers: tuple[int, ...] = ()
    features_behind: bool = False
    tile_tables: str = "canvases"
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def tokens(self) -> int:
        """Tokens of a tile, P: its patches and one of the whole tile."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def features(self) -> int:
        """Width of a token's features, E."""
        return self.width * (1 + len(self.feature_layers))

    def setup(self) -> None:
        check_remat(self.remat)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"image_heads={self.heads} must divide image_width={self.width}")
        if any(not 0 <= layer < self.layers for layer in self.feature_layers):
            raise ValueError(f"feature_layers={self.feature_layers} must be among the {self.layers} first layers")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        side, init = (self.patch_size, self.patch_size), nn.initializers.normal(self.width**-0.5)
        self.patch = Conv(self.width, side, side, use_bias=False, kernel_init=_INIT, **types)
        self.class_embedding = self.param("class_embedding", init, (self.width,), self.param_dtype)
        self.position = nn.Embed(self.tokens, self.width, embedding_init=init, **types)
        zeros = nn.initializers.zeros_init()
        self.position_gate = self.param("position_gate", zeros, (1,), self.param_dtype)
        self.first_tile_gate = self.param("first_tile_gate", zeros, (1,), self.param_dtype)
        self.last_tile_gate = self.param("last_tile_gate", zeros, (1,), self.param_dtype)
        tables = {"tables": self.tile_tables, "embedding_init": init, **types}
        self.tile_position = TilePositions(self.max_tiles, (self.tokens, self.width), **tables)
        self.first_tile = TilePositions(self.max_tiles, (self.width,), **tables)
        self.last_tile = TilePositions(self.max_tiles, (self.width,), **tables)
        self.first_norm, self.last_norm = layer_norm(**types), layer_norm(**types)

        def layer(residual_gates: bool) -> Block:
            return Block(
                width=self.width,
                heads=self.heads,
                head_dim=self.width // self.heads,
                mlp_hidden=round(self.width * self.mlp_ratio),
                activation="gelu",
                initializers=BlockInitializers(_INIT, _INIT, _INIT, _INIT),
                attention_bias=False,
                attention_out_bias=False,
                residual_gates=residual_gates,
                implementation=self.implementation,
                **types,
            )

        self.blocks = [layer(False) for _ in range(self.layers)]
        self.global_blocks = [layer(True) for _ in range(self.global_layers)]

    def __call__(
        self, tiles: Float[Array, "b {self.max_tiles} h w 3"], canvas: Int[Array, "b"]
    ) -> Float[Array, "b {self.max_tiles} p e"]:
        """Encodes pictures.

        Args:
          tiles: in [-1, 1], row by row of the canvas; what those are that a canvas does not have changes nothing.
          canvas: the number of each picture's canvas, 0 for no picture.

        Returns:
          features of each token; entry D + n c + k is channel c of the k-th of n feature layers.
        """
        batch, count = tiles.shape[:2]
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        there = jnp.arange(count) < jnp.asarray(tiles_of_canvases(self.max_tiles))[canvas][:, None]
        pixels = jnp.where(there[..., None, None, None], ((tiles + 1) / 2 - mean) / std, 0)
        patches = self.patch(pixels.astype(self.dtype).reshape(-1, *tiles.shape[2:]))
        x = patches.reshape(batch, count, -1, self.width)
        x = x + self._gated(self.first_tile(canvas)[:, :, None], self.first_tile_gate)
        whole = jnp.broadcast_to(self.class_embedding.astype(x.dtype), (batch, count, 1, self.width))
        x = jnp.concatenate([whole, x], axis=2)
        gate = jnp.tanh(self.position_gate).astype(x.dtype)
        x = x + self.position(jnp.arange(self.tokens)) * (1 - gate) + self.tile_position(canvas) * gate
        x = self.first_norm(x)
        pads = -self.tokens % _MULTIPLE
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pads), (0, 0)))
        mask = self._mask(there, pads)

        x = shard_rows(x.reshape(batch, -1, self.width))
        x, between = self._apply_first(x, mask)
        x = self.last_norm(x).reshape(batch, count, -1, self.width)
        x = x + self._gated(self.last_tile(canvas)[:, :, None], self.last_tile_gate)
        x = self._apply(self.global_blocks, x.reshape(batch, -1, self.width), mask)
        if between:
            x = jnp.concatenate([x, jnp.stack(between, axis=-1).reshape(*x.shape[:-1], -1)], axis=-1)
        return x.reshape(batch, count, self.tokens + pads, self.features)[:, :, : self.tokens]

    def _apply_first(self, x: Array, mask: Array | None) -> tuple[Array, list[Array]]:
        """The state behind the first layers, and those that are features."""
        between, start = {}, 0
        for layer in sorted(set(self.feature_layers)):
            stop = layer + self.features_behind
            x = self._apply(self.blocks[start:stop], x, mask)
            between[layer], start = x, stop
        return self._apply(self.blocks[start:], x, mask), [between[layer] for layer in self.feature_layers]

    def _apply(self, blocks: Sequence[Block], x: Array, mask: Array | None) -> Array:
        return apply_blocks(blocks, x, [mask], [0] * len(blocks), scan=self.scan, remat=self.remat)

    def _mask(self, there: Bool[Array, "b t"], pads: int) -> Bool[Array, "b 1 l l"]:
        """Which tokens see which, all but pads pads: [B 1 L L]."""
        real = jnp.broadcast_to(there[..., None], (*there.shape, self.tokens))
        real = jnp.pad(real, ((0, 0), (0, 0), (0, pads))).reshape(len(there), -1)
        return (real[:, :, None] | real[:, None])[:, None]

    def _gated(self, x: Array, gate: Array) -> Array:
        return x * jnp.tanh(gate).astype(x.dtype)
