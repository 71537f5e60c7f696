"""A language model that is told of pictures by a prefix: vectors that a mapper makes of a picture stand in the text.

Mokady et al. 2021, "ClipCap: CLIP Prefix for Image Captioning", section 3.2: a transformer reads the picture's encoding
beside learned states, whose last values are what a frozen language model reads. There the encoding is the one vector of
a CLIP; here all features of the encoder, which is trained too, as those that a `models.vision_adapter` looks at.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.layers.dense import Dense
from models.layers.partitioning import shard_rows
from models.layers.prompt_cache import PromptCache, causal_mask, last_state
from models.layers.transformer import Block, BlockInitializers, apply_blocks
from models.llama import INIT_STD
from models.picture_reader import PictureReader


class VisionPrefix(PictureReader, kw_only=True):
    """A `PictureReader` with a mapper, whose P vectors are added to the embeddings of a picture's P tokens.

    A token sees all pictures before it. The language model's parameters are under `language`.

    Attributes:
      prefix_length: tokens of a picture, P.
      mapper_layers: layers of the mapper.
      mapper_heads: its heads, which divide D.
      mapper_hidden: hidden width of its feed-forward blocks.
    """

    prefix_length: int
    mapper_layers: int
    mapper_heads: int
    mapper_hidden: int

    @property
    def picture_tokens(self) -> int:
        """Tokens in a row that stand for one picture in a text."""
        return self.prefix_length

    def setup(self) -> None:
        super().setup()
        if self.prefix_length < 1 or self.mapper_heads < 1 or self.width % self.mapper_heads:
            raise ValueError(
                f"prefix_length={self.prefix_length} must be at least 1, and mapper_heads={self.mapper_heads} divide "
                f"width={self.width}"
            )
        types, init = {"dtype": self.dtype, "param_dtype": self.param_dtype}, nn.initializers.normal(INIT_STD)
        self.projection = Dense(self.width, kernel_init=init, **types)
        self.prefix = nn.Embed(self.prefix_length, self.width, embedding_init=init, **types)
        self.mapper_blocks = [
            Block(
                width=self.width,
                heads=self.mapper_heads,
                head_dim=self.width // self.mapper_heads,
                mlp_hidden=self.mapper_hidden,
                activation="gelu",
                initializers=BlockInitializers(init, init, init, init),
                attention_bias=False,
                attention_out_bias=False,
                implementation=self.implementation,
                **types,
            )
            for _ in range(self.mapper_layers)
        ]

    def __call__(
        self,
        tokens: Int[Array, "b l"],
        tiles: Float[Array, "b i t h w 3"] | None = None,
        canvas: Int[Array, "b i"] | None = None,
        positions: Int[Array, "b l"] | None = None,
        segments: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l v"]:
        """Scores the token behind each one; float32. See `models.vision_adapter.VisionAdapter.__call__`.

        A picture has P tokens in a row; the first P picture tokens of a text are of its first picture.
        """
        x = self._read(tokens, tiles, canvas)
        mask = causal_mask(tokens.shape[1], segments)
        return self.language.logits(self.language.apply_layers(x, 0, self.depth, mask, positions))

    def encode(self, tiles: Float[Array, "b i t h w 3"], canvas: Int[Array, "b i"]) -> Float[Array, "b m d"]:
        """The vectors of all pictures of a text, P of each; those of a picture that is not there are 0."""
        pictures = canvas.size
        features = self.projection(self.encoder(tiles.reshape(-1, *tiles.shape[2:]), canvas.reshape(-1)))
        features = features.reshape(pictures, -1, self.width)
        own = jnp.broadcast_to(self.prefix(jnp.arange(self.prefix_length)), (pictures, self.prefix_length, self.width))
        there = jnp.repeat(self.tiles_there(canvas).reshape(pictures, -1), self.encoder.tokens, axis=1)
        mask = jnp.pad(there, ((0, 0), (0, self.prefix_length)), constant_values=True)[:, None, None]
        x = shard_rows(jnp.concatenate([features, own], axis=1))
        x = apply_blocks(self.mapper_blocks, x, [mask], [0] * self.mapper_layers, scan=self.scan, remat=self.remat)
        vectors = jnp.where(there.any(axis=1)[:, None, None], x[:, -self.prefix_length :], 0)
        return shard_rows(vectors.reshape(len(tiles), -1, self.width))

    def prefill(
        self,
        tokens: Int[Array, "b t"],
        length: int,
        lengths: Int[Array, "b"] | None = None,
        tiles: Float[Array, "b i t2 h w 3"] | None = None,
        canvas: Int[Array, "b i"] | None = None,
    ) -> tuple[Float[Array, "b v"], PromptCache, None]:
        """Reads prompts with their pictures in one pass; see `models.vision_adapter.VisionAdapter.prefill`.

        Returns:
          (scores of the first token that is made, the cache with the prompts in it, None: there is no more to look at).
        """
        batch, prompts = tokens.shape
        lengths = jnp.full(batch, prompts, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        x, layers = self.language.prefill_layers(self._read(tokens, tiles, canvas), 0, self.depth, prompts + length)
        return self.language.logits(last_state(x, lengths))[:, 0], PromptCache(tuple(layers), lengths, prompts), None

    def decode_step(
        self, token: Int[Array, "r"], position: Int[Array, ""] | int, cache: PromptCache, sight: None = None
    ) -> tuple[Float[Array, "r v"], PromptCache]:
        """Reads token `position` of those that are made, none of which is a picture, and scores the next one."""
        del sight
        x, layers = self.language.decode_layers(self.embed(token[:, None]), 0, self.depth, position, cache)
        return self.language.logits(x)[:, 0], PromptCache(tuple(layers), cache.lengths, cache.prompt_length)

    def _read(self, tokens: Array, tiles: Array | None, canvas: Array | None) -> Array:
        """The first state of each token, those of pictures with what is to be seen; pictures beyond have nothing."""
        x = self.embed(tokens)
        if tiles is None or canvas is None:
            return x
        vectors, is_picture = self.encode(tiles, canvas), tokens == self.image_token
        number = jnp.cumsum(is_picture, axis=1) - 1
        of_token = jnp.take_along_axis(vectors, jnp.clip(number, 0, vectors.shape[1] - 1)[..., None], axis=1)
        return x + jnp.where((is_picture & (number < vectors.shape[1]))[..., None], of_token, 0)
