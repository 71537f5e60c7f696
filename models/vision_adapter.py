"""The vision adapter of Llama 3.2: a language model that looks at pictures through layers between its own.

Dubey et al. 2024, "The Llama 3 Herd of Models", section 7, and the code that was published with the weights.

A picture has one token in the text. A token sees the pictures of the last run of picture tokens at or before it: with
each picture on its own in the text, the last one; of several in a row all, from the token of each one on. What stands
before the first picture sees none, and is what the language model alone makes of it.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from models.layers.dense import Dense
from models.layers.gated_cross_attention import GatedCrossBlock
from models.layers.partitioning import shard_rows
from models.layers.prompt_cache import PromptCache, causal_mask, last_state
from models.layers.self_attention import KeyValueCache
from models.layers.transformer import rematerialized
from models.llama import INIT_STD
from models.picture_reader import PictureReader


@struct.dataclass
class Sight:
    """What texts look at: the pictures' keys and values of each cross-attention layer.

    Attributes:
      layers: of each cross-attention layer, [B M H K]; M tokens of all pictures of a text, tile by tile.
      seen: [B M] what the last token of the text sees, and so all that are made after it.
    """

    layers: tuple[KeyValueCache, ...]
    seen: Bool[Array, "b m"]


class VisionAdapter(PictureReader, kw_only=True):
    """A `PictureReader` with a projection, and gated cross-attention layers before some of the language model's.

    Gates start at 0: at first the logits are those of the language model, in float32 to the bit (in bfloat16 a compiler
    may round between the layers elsewhere than without them). The language model's parameters are under `language`, all
    others are the adapter's and the encoder's.

    Attributes:
      cross_layers: the language model's layers before which a cross-attention layer stands, rising; published every
        fourth, 3, 7, 11, ...
      as_transformers: compute what transformers does until at least 5.24 where that differs from the published code:
        features are taken behind their layers, and tokens that see no picture are told of all of them by attention.
    """

    cross_layers: tuple[int, ...]
    as_transformers: bool = False

    @property
    def features_behind(self) -> bool:
        """See `models.tiled_image_encoder.TiledImageEncoder`."""
        return self.as_transformers

    def setup(self) -> None:
        super().setup()
        cross = self.cross_layers
        if tuple(sorted(set(cross))) != tuple(cross) or any(not 0 <= layer < self.depth for layer in cross):
            raise ValueError(f"cross_layers={cross} must rise and be among the {self.depth} of the language model")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(INIT_STD)
        self.projection = Dense(self.width, kernel_init=init, **types)
        self.cross_blocks = [
            GatedCrossBlock(
                self.width,
                self.heads,
                self.kv_heads,
                self.head_dim or self.width // self.heads,
                self.mlp_hidden,
                blind_attention=self.as_transformers,
                kernel_init=init,
                implementation=self.implementation,
                **types,
            )
            for _ in cross
        ]

    def __call__(
        self,
        tokens: Int[Array, "b l"],
        tiles: Float[Array, "b i t h w 3"] | None = None,
        canvas: Int[Array, "b i"] | None = None,
        positions: Int[Array, "b l"] | None = None,
        segments: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l v"]:
        """Scores the token behind each one; float32.

        Args:
          tokens: ids; pads go behind. The n-th picture token of a text is of its n-th picture.
          tiles: of each text's pictures, in [-1, 1], see `models.tiled_image_encoder.TiledImageEncoder`; None for texts
            without any.
          canvas: the number of each picture's canvas, 0 where there is no picture.
          positions: of each token; None for 0, 1, 2, ...
          segments: which of several texts in a row a token is of; a token sees its own text alone, and its pictures.
        """
        x, mask = self.embed(tokens), causal_mask(tokens.shape[1], segments)
        if tiles is None or canvas is None:
            return self.language.logits(self.language.apply_layers(x, 0, self.depth, mask, positions))
        features = self.encode(tiles, canvas)
        seen = self._seen(pictures_seen(tokens, self.image_token, tiles.shape[1], segments), canvas)
        for block, (start, stop) in zip([None, *self.cross_blocks], self._runs, strict=True):
            if block is not None:
                x = self._look(block, x, features, seen)
            x = self.language.apply_layers(x, start, stop, mask, positions)
        return self.language.logits(x)

    def encode(self, tiles: Float[Array, "b i t h w 3"], canvas: Int[Array, "b i"]) -> Float[Array, "b m d"]:
        """What the language model looks at: the projected features of all tokens of all tiles of all pictures."""
        features = self.encoder(tiles.reshape(-1, *tiles.shape[2:]), canvas.reshape(-1))
        return shard_rows(self.projection(features).reshape(len(tiles), -1, self.width))

    def prefill(
        self,
        tokens: Int[Array, "b t"],
        length: int,
        lengths: Int[Array, "b"] | None = None,
        tiles: Float[Array, "b i t2 h w 3"] | None = None,
        canvas: Int[Array, "b i"] | None = None,
    ) -> tuple[Float[Array, "b v"], PromptCache, Sight | None]:
        """Reads prompts, and pictures once, in one parallel pass; arguments as in `Llama.prefill` and `__call__`.

        Returns:
          (scores of the first token that is made, the cache with the prompts in it, what `decode_step` looks at).
        """
        batch, prompts = tokens.shape
        lengths = jnp.full(batch, prompts, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        x, layers, memories = self.embed(tokens), [], []
        features = seen = None
        if tiles is not None and canvas is not None:
            features = self.encode(tiles, canvas)
            seen = self._seen(pictures_seen(tokens, self.image_token, tiles.shape[1]), canvas)
        for block, (start, stop) in zip([None, *self.cross_blocks], self._runs, strict=True):
            if block is not None and features is not None and seen is not None:
                memories.append(block.remember(features))
                x = block(x, memories[-1], seen)
            x, caches = self.language.prefill_layers(x, start, stop, prompts + length)
            layers += caches
        sight = None
        if seen is not None:
            last = jnp.take_along_axis(seen, (lengths - 1)[:, None, None], axis=1)[:, 0]
            sight = Sight(tuple(memories), last)
        logits = self.language.logits(last_state(x, lengths))[:, 0]
        return logits, PromptCache(tuple(layers), lengths, prompts), sight

    def decode_step(
        self, token: Int[Array, "r"], position: Int[Array, ""] | int, cache: PromptCache, sight: Sight | None = None
    ) -> tuple[Float[Array, "r v"], PromptCache]:
        """Reads token `position` of those that are made, none of which is a picture, and scores the next one.

        Args:
          token: of each row; R is B, or a multiple of it with the rows of an example together (the beams of a search).
          position: its index.
          cache: from `prefill` or the step before.
          sight: from `prefill`, of the B examples: it has no rows, so that a search does not copy it.
        """
        x, layers = self.embed(token[:, None]), []
        for index, (start, stop) in enumerate(self._runs):
            if index and sight is not None:
                memory = sight.layers[index - 1]
                rows = x.reshape(len(memory.key), -1, self.width)
                seen = jnp.broadcast_to(sight.seen[:, None], (*rows.shape[:2], sight.seen.shape[1]))
                x = self.cross_blocks[index - 1](rows, memory, seen).reshape(x.shape)
            x, caches = self.language.decode_layers(x, start, stop, position, cache)
            layers += caches
        return self.language.logits(x)[:, 0], PromptCache(tuple(layers), cache.lengths, cache.prompt_length)

    @property
    def _runs(self) -> list[tuple[int, int]]:
        """The language model's layers between two cross-attention layers: (first, behind the last)."""
        ends = (0, *self.cross_layers, self.depth)
        return list(zip(ends[:-1], ends[1:], strict=True))

    def _look(self, block: GatedCrossBlock, x: Array, features: Array, seen: Array) -> Array:
        """Applies a cross-attention layer, whose keys and values are recomputed with it."""
        if self.remat == "none" or self.is_initializing():
            return block(x, block.remember(features), seen)
        pure, params = block.clone(parent=None, name=None), block.variables["params"]

        def apply(params: dict, x: Array, features: Array) -> Array:
            memory = pure.apply({"params": params}, features, method="remember")
            return pure.apply({"params": params}, x, memory, seen)

        return rematerialized(apply, self.remat)(params, x, features)

    def _seen(self, visible: Bool[Array, "b l i"], canvas: Int[Array, "b i"]) -> Bool[Array, "b l m"]:
        """Which tokens of the pictures each token of a text sees: those of the tiles that there are."""
        seen = (visible[..., None] & self.tiles_there(canvas)[:, None]).reshape(*visible.shape[:2], -1)
        return jnp.repeat(seen, self.encoder.tokens, axis=-1)


def pictures_seen(
    tokens: Int[Array, "b l"], image_token: int, images: int, segments: Int[Array, "b l"] | None = None
) -> Bool[Array, "b l i"]:
    """Which of a text's pictures each of its tokens sees, see the top of this file.

    Args:
      tokens: ids.
      image_token: which of them is a picture.
      images: how many pictures a text has at most, I; picture tokens beyond see nothing.
      segments: which of several texts in a row a token is of.
    """
    image = tokens == image_token
    before = jnp.pad(image[:, :-1], ((0, 0), (1, 0)))
    begins = image & ~before
    if segments is not None:
        begins |= image & (segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0))))
    run = jnp.cumsum(begins, axis=1)
    number = jnp.cumsum(image, axis=1) - 1
    # [B L I]: whether token l is that of picture i; then of each picture its place and what is known there.
    is_of = image[..., None] & (number[..., None] == jnp.arange(images))

    def there(values: Array) -> Array:
        return jnp.sum(jnp.where(is_of, values[..., None], 0), axis=1)

    place = jnp.arange(tokens.shape[1])
    places = jnp.where(is_of.any(axis=1), there(jnp.broadcast_to(place, tokens.shape)), tokens.shape[1])
    seen = (places[:, None] <= place[:, None]) & (there(run)[:, None] == run[..., None])
    if segments is not None:
        seen &= there(segments)[:, None] == segments[..., None]
    return seen
