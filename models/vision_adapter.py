"""The vision adapter of Llama 3.2: a language model that looks at pictures through layers between its own.

Dubey et al. 2024, "The Llama 3 Herd of Models", section 7, and the code that was published with the weights.

A picture has one token in the text. A token sees the pictures of the last run of picture tokens at or before it: with
each picture on its own in the text, the last one; of several in a row all, from the token of each one on. What stands
before the first picture sees none, and is what the language model alone makes of it.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from models.clip import IMAGE_MEAN, IMAGE_STD, Clip
from models.clip_to_tiles import encoder_from_clip
from models.layers.attention import KeyValueCache
from models.layers.dense import Dense
from models.layers.gated_cross_attention import GatedCrossBlock
from models.layers.partitioning import shard_rows
from models.layers.prompt_cache import PromptCache, causal_mask, last_state
from models.layers.tile_positions import tiles_of_canvases
from models.layers.transformer import rematerialized
from models.llama import INIT_STD, Llama
from models.tiled_image_encoder import TiledImageEncoder


@struct.dataclass
class Sight:
    """What texts look at: the pictures' keys and values of each cross-attention layer.

    Attributes:
      layers: of each cross-attention layer, [B M H K]; M tokens of all pictures of a text, tile by tile.
      seen: [B M] what the last token of the text sees, and so all that are made after it.
    """

    layers: tuple[KeyValueCache, ...]
    seen: Bool[Array, "b m"]


class VisionAdapter(nn.Module):
    """A `Llama` with an image encoder, a projection, and gated cross-attention layers before some of its own layers.

    Gates start at 0: at first the logits are those of the language model, in float32 to the bit (in bfloat16 a compiler
    may round between the layers elsewhere than without them). The language model's parameters are under `language`, all
    others are the adapter's and the encoder's.

    Attributes:
      text_vocab_size: of the language model, as the fields down to `tied` and the next three; see `models.llama.Llama`.
      width: see there.
      depth: see there; without the cross-attention layers.
      heads: see there, as the next eight.
      kv_heads: see there.
      mlp_hidden: see there.
      head_dim: see there.
      rope_theta: see there.
      rope_factor: see there.
      rope_low_factor: see there.
      rope_high_factor: see there.
      rope_original_length: see there.
      tied: see there.
      text_end_id: see there.
      text_stop_ids: see there.
      text_pad_id: see there.
      cross_layers: the language model's layers before which a cross-attention layer stands, rising; published every
        fourth, 3, 7, 11, ...
      image_token: the id that stands for a picture.
      extra_tokens: ids behind the language model's, with embeddings of their own that are the adapter's, and no score.
      tile_size: side of a tile, pixels; as the next nine see `models.tiled_image_encoder.TiledImageEncoder`.
      patch_size: see there.
      image_width: its width.
      image_heads: its heads.
      image_layers: its layers.
      global_layers: see there.
      image_mlp_ratio: its mlp_ratio.
      max_tiles: see there.
      feature_layers: see there.
      tile_tables: see there.
      image_mean: see there.
      image_std: see there.
      as_transformers: compute what transformers does until at least 5.24 where that differs from the published code:
        features are taken behind their layers, and tokens that see no picture are told of all of them by attention.
      implementation: see `models.layers.attention.attend`.
      scan: see `models.layers.transformer.apply_blocks`.
      remat: see there.
      dtype: of the computation; statistics, angles, scores, softmax and logits are float32 in any case.
      param_dtype: of the parameters.
    """

    ADAPTABLE: ClassVar[tuple[str, ...]] = Llama.ADAPTABLE

    text_vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_hidden: int
    cross_layers: tuple[int, ...]
    image_token: int
    tile_size: int
    patch_size: int
    image_width: int
    image_heads: int
    image_layers: int
    global_layers: int
    head_dim: int | None = None
    rope_theta: float = 500000.0
    rope_factor: float = 1.0
    rope_low_factor: float = 1.0
    rope_high_factor: float = 4.0
    rope_original_length: int = 8192
    tied: bool = False
    text_end_id: int | None = None
    text_stop_ids: tuple[int, ...] = ()
    text_pad_id: int = 0
    extra_tokens: int = 8
    image_mlp_ratio: int | float = 4
    max_tiles: int = 4
    feature_layers: tuple[int, ...] = ()
    tile_tables: str = "canvases"
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    as_transformers: bool = False
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    # Places within that start from a part of another network's weights; see `adopt`.
    ADOPTS: ClassVar[tuple[str, ...]] = ("encoder",)

    def adopt(self, place: str, params: Any, theirs: Any) -> Any:
        """Some of the parameters at a place within, made of another network's: of `encoder` what a CLIP has of it.

        Raises:
          ValueError: if that is another network, or of other widths.
        """
        del place
        if not isinstance(theirs, Clip):
            raise ValueError("the encoder starts from a CLIP's tower")
        return encoder_from_clip(params, theirs, self)

    def adapt(self, params: Any, theirs: "VisionAdapter") -> Any:
        """Parameters of a network that differs in `ADAPTABLE`, as they are."""
        del theirs
        return params

    def example_inputs(
        self, batch_size: int
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the first arguments of `__call__`: a picture and two tokens; more do as well."""
        size = (batch_size, 1, self.max_tiles, self.tile_size, self.tile_size, 3)
        return (
            jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
            jax.ShapeDtypeStruct(size, jnp.float32),
            jax.ShapeDtypeStruct((batch_size, 1), jnp.int32),
        )

    def network_at(self, path: str) -> dict[str, Any]:
        """The arguments of `models.create_model` of a network within this one, whose parameters are its own there.

        Raises:
          KeyError: if there is none; names those that there are.
        """
        if path != "language":
            raise KeyError(f"vision_adapter has no network {path!r} within it; it has language")
        names = {field.name for field in dataclasses.fields(Llama)} - {"parent", "name"}
        fields = {name: getattr(self, name) for name in sorted(names)}
        return {"name": "llama", **fields}

    def setup(self) -> None:
        cross = self.cross_layers
        if tuple(sorted(set(cross))) != tuple(cross) or any(not 0 <= layer < self.depth for layer in cross):
            raise ValueError(f"cross_layers={cross} must rise and be among the {self.depth} of the language model")
        if not 0 <= self.image_token < self.text_vocab_size + self.extra_tokens:
            raise ValueError(
                f"image_token={self.image_token} must be one of {self.text_vocab_size + self.extra_tokens} ids"
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        computed = {"implementation": self.implementation, "scan": self.scan, "remat": self.remat, **types}
        fields = self.network_at("language")
        self.language = Llama(**{name: value for name, value in fields.items() if name != "name"})
        init = nn.initializers.normal(INIT_STD)
        if self.extra_tokens:
            self.extra_embedding = nn.Embed(self.extra_tokens, self.width, embedding_init=init, **types)
        self.encoder = TiledImageEncoder(
            image_size=self.tile_size,
            patch_size=self.patch_size,
            width=self.image_width,
            heads=self.image_heads,
            layers=self.image_layers,
            global_layers=self.global_layers,
            mlp_ratio=self.image_mlp_ratio,
            max_tiles=self.max_tiles,
            feature_layers=self.feature_layers,
            features_behind=self.as_transformers,
            tile_tables=self.tile_tables,
            image_mean=self.image_mean,
            image_std=self.image_std,
            **computed,
        )
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
        x, mask = self._embed(tokens), causal_mask(tokens.shape[1], segments)
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
        x, layers, memories = self._embed(tokens), [], []
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
        x, layers = self._embed(token[:, None]), []
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

    def _embed(self, tokens: Array) -> Array:
        """The first state of each token."""
        if not self.extra_tokens:
            return self.language.embed(tokens)
        own = tokens < self.text_vocab_size
        x = self.language.embed(jnp.where(own, tokens, 0))
        extra = self.extra_embedding(jnp.clip(tokens - self.text_vocab_size, 0, self.extra_tokens - 1))
        return jnp.where(own[..., None], x, extra)

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
        count = jnp.asarray(tiles_of_canvases(self.max_tiles))[canvas]
        there = (jnp.arange(self.max_tiles) < count[..., None]) & (canvas > 0)[..., None]
        seen = (visible[..., None] & there[:, None]).reshape(*visible.shape[:2], -1)
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
