"""The autoregressive transformer of DALL-E over one stream of caption tokens and image tokens.

Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.2 and appendix B. What each index of the stream
reads and predicts is drawn in `models.layers.attention_masks`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.layers.attention_masks import attention_mask, attention_pattern
from models.layers.dense import Dense
from models.layers.normalization import layer_norm
from models.layers.partitioning import shard_rows
from models.layers.self_attention import KeyValueCache
from models.layers.transformer import Block, BlockInitializers, apply_blocks, check_remat

INIT_STD = 0.02
IMAGE_POSITIONS = ("grid", "raster")
Cache = tuple[KeyValueCache, ...]


def position_pads(text: Int[Array, "b t"], vocab_size: int) -> Int[Array, "b t"]:
    """Gives every text position its own pad token: id 0 at position p becomes vocab_size + p (section 2.2)."""
    return jnp.where(text == 0, vocab_size + jnp.arange(text.shape[1], dtype=text.dtype), text)


@struct.dataclass
class DalleLogits:
    """Float32 scores of the next token; each position predicts its own modality only.

    Attributes:
      text: [B T V_text + T]; entry p predicts caption token p, pads by their id in `position_pads`. Without a start
        token there is no entry of the first one, without own pads no id of a pad.
      image: [B N V_image]; entry j predicts image token j in raster order.
    """

    text: Float[Array, "b t v"]
    image: Float[Array, "b n w"]


class Dalle(nn.Module):
    """DALL-E's second stage.

    Weights and embeddings start at N(0, 0.02^2), biases at 0; projections into the residual stream at
    N(0, 0.02^2 / (2 depth)) (Radford et al. 2019). Captions have learned positions, image tokens a learned row plus a
    learned column. Text and image have output heads of their own, which equals one untied head over both vocabularies
    whose logits are masked to the position's modality. Parameters per layer: 12 D^2 + 13 D at the published shape.
    Fields from `start_token` on are as published unless set; other projects' transformers differ in them.

    Attributes:
      text_vocab_size: ids of the tokenizer; id 0 is the pad, replaced by one learned pad per position.
      text_length: caption tokens T.
      image_vocab_size: codes of the image tokenizer.
      image_grid: (height, width) of the image tokens.
      width: D.
      depth: number of layers.
      heads: number of attention heads.
      head_dim: width of one head; None for width // heads.
      mlp_ratio: hidden width of the feed-forward block over D.
      activation: see `models.layers.mlp.ACTIVATIONS`.
      start_token: the stream begins with a learned token, by which the first caption token is predicted.
      own_pads: each text position has a pad of its own; otherwise id 0 is a token like others.
      image_positions: "grid" for a learned row plus a learned column, "raster" for a learned position of each token.
      head_bias: whether the output heads have one.
      attention_bias: whether the query/key/value projections have one.
      gated_mlp: whether feed-forward blocks are gated, see `models.layers.mlp.GatedMLP`.
      attention: "published" for `attention_pattern`, one layer type for all layers ("full"), or a tuple of layer types
        repeated over the depth.
      conv_kernel: window of "conv" layers.
      conv_edge: its behavior at the edges, see `attention_mask`.
      implementation: see `models.layers.attention.attend`; sampling uses the plain one. Of its masks only that of
        "full" layers is causal and nothing else, which "auto" gives to a fused kernel.
      scan: compile one layer for all of them (see `apply_blocks`): a TPU program compiles faster, but without `remat`
        it keeps more for the backward pass than layers one by one do. Sampling does not depend on it.
      remat: what each layer recomputes in the backward pass (see `apply_blocks`).
      dtype: of the computation; LayerNorm statistics, attention scores, softmax and logits are float32 in any case.
      param_dtype: of the parameters.
    """

    text_vocab_size: int
    text_length: int
    image_vocab_size: int
    image_grid: tuple[int, int]
    width: int
    depth: int
    heads: int
    head_dim: int | None = None
    mlp_ratio: int | float = 4
    activation: str = "gelu"
    start_token: bool = True
    own_pads: bool = True
    image_positions: str = "grid"
    head_bias: bool = True
    attention_bias: bool = True
    gated_mlp: bool = False
    attention: str | tuple[str, ...] = "published"
    conv_kernel: int = 11
    conv_edge: str = "wraparound"
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def image_length(self) -> int:
        """Image tokens N of a picture."""
        return self.image_grid[0] * self.image_grid[1]

    @property
    def text_ids(self) -> int:
        """Ids of caption tokens, pads included."""
        return self.text_vocab_size + (self.text_length if self.own_pads else 0)

    @property
    def text_block(self) -> int:
        """Inputs before the first image token: the caption, and the start token if there is one."""
        return self.text_length + self.start_token

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The attention type of each layer."""
        if self.attention == "published":
            return attention_pattern(self.depth)
        cycle = (self.attention,) if isinstance(self.attention, str) else self.attention
        return tuple(cycle[i % len(cycle)] for i in range(self.depth))

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shapes = (batch_size, self.text_length), (batch_size, self.image_length)
        return jax.ShapeDtypeStruct(shapes[0], jnp.int32), jax.ShapeDtypeStruct(shapes[1], jnp.int32)

    def setup(self) -> None:
        check_remat(self.remat)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(INIT_STD)
        height, width = self.image_grid

        def table(rows: int) -> nn.Embed:
            return nn.Embed(rows, self.width, embedding_init=init, **types)

        if self.image_positions not in IMAGE_POSITIONS:
            choices = ", ".join(IMAGE_POSITIONS)
            raise ValueError(f"unknown image_positions {self.image_positions!r}; choose one of {choices}")
        if self.start_token:
            self.bos = table(1)
        self.text_embedding, self.text_position = table(self.text_ids), table(self.text_length)
        self.image_embedding = table(self.image_vocab_size)
        if self.image_positions == "raster":
            self.image_position = table(height * width)
        else:
            self.row_position, self.column_position = table(height), table(width)
        self.blocks = [Block(**self._block_fields) for _ in range(self.depth)]
        self.final_norm = layer_norm(**types)
        # In float32 whatever the blocks compute in: bfloat16 logits near 16 would be steps of 1/8.
        heads = {"kernel_init": init, "dtype": jnp.float32, "param_dtype": self.param_dtype, "use_bias": self.head_bias}
        self.text_head = Dense(self.text_ids, **heads)
        self.image_head = Dense(self.image_vocab_size, **heads)

    def __call__(self, text: Int[Array, "b t"], image_tokens: Int[Array, "b n"]) -> DalleLogits:
        """Scores every token of the stream given the tokens before it.

        Args:
          text: caption ids, 0 where there is no token.
          image_tokens: codes in raster order; the last one is predicted but not read.

        Raises:
          ValueError: if a length is not the network's.
        """
        self._check_lengths(text, image_tokens)
        x = jnp.concatenate([self._embed_text(text), self._embed_image(image_tokens[:, :-1], 0)], axis=1)
        x = shard_rows(x)
        x = apply_blocks(self.blocks, x, *self._masks(), scan=self.scan, remat=self.remat)
        x = self.final_norm(x)
        # The last input of the text block predicts the first image token.
        text_states, image_states = x[:, : self.text_block - 1], x[:, self.text_block - 1 :]
        return DalleLogits(shard_rows(self.text_head(text_states)), shard_rows(self.image_head(image_states)))

    def text_targets(self, text: Int[Array, "b t"]) -> Int[Array, "b s"]:
        """The ids that `DalleLogits.text` scores, of a caption."""
        ids = position_pads(text, self.text_vocab_size) if self.own_pads else text
        return ids if self.start_token else ids[:, 1:]

    def prefill(self, text: Int[Array, "b t"]) -> tuple[Float[Array, "b v"], Cache]:
        """Reads a caption in one parallel pass.

        Returns:
          (logits of image token 0, the cache with the caption in it).

        Raises:
          ValueError: if the caption's length is not the network's.
        """
        self._check_lengths(text, None)
        x = shard_rows(self._embed_text(text))
        size = x.shape[1]
        cache = []
        for block, mask in zip(self.blocks, self._layer_masks(), strict=True):
            x, layer = block.prefill(x, mask[:size, :size], self.text_block + self.image_length - 1)
            cache.append(layer)
        return self._image_logits(x[:, -1:]), tuple(cache)

    def decode_step(
        self, token: Int[Array, "b"], position: Int[Array, ""], cache: Cache
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Reads image token `position` (0 to N - 2) and scores the next one.

        Args:
          token: the image token at `position`.
          position: its raster index.
          cache: from `prefill` or the step before.

        Returns:
          (logits of image token position + 1, the cache with this token in it).
        """
        x = shard_rows(self._embed_image(token[:, None], position))
        index = self.text_block + position
        masks, kinds = self._masks()
        rows = [jax.lax.dynamic_slice_in_dim(jnp.asarray(mask), index, 1) for mask in masks]
        layers = []
        for block, kind, layer in zip(self.blocks, kinds, cache, strict=True):
            x, layer = block.decode(x, rows[kind], index, layer)
            layers.append(layer)
        return self._image_logits(x), tuple(layers)

    def _image_logits(self, x: Array) -> Array:
        """Float32 scores of the next image token from one state [B 1 D]."""
        return self.image_head(self.final_norm(x))[:, 0]

    def _embed_text(self, text: Array) -> Array:
        """The start token, if there is one, and the caption, [B T+1 D] or [B T D]."""
        ids = position_pads(text, self.text_vocab_size) if self.own_pads else text
        tokens = self.text_embedding(ids) + self.text_position(jnp.arange(self.text_length))
        if not self.start_token:
            return tokens
        bos = self.bos(jnp.zeros((text.shape[0], 1), jnp.int32))
        return jnp.concatenate([bos, tokens], axis=1)

    def _embed_image(self, tokens: Array, start: Array | int) -> Array:
        """Image tokens [B M] at raster indices start .. start + M - 1, as [B M D]."""
        place = start + jnp.arange(tokens.shape[1])
        if self.image_positions == "raster":
            return self.image_embedding(tokens) + self.image_position(place)
        row, column = jnp.divmod(place, self.image_grid[1])
        return self.image_embedding(tokens) + self.row_position(row) + self.column_position(column)

    @property
    def _block_fields(self) -> dict[str, Any]:
        """What every layer is made with."""
        return {
            "width": self.width,
            "heads": self.heads,
            "head_dim": self.head_dim or self.width // self.heads,
            "mlp_hidden": round(self.width * self.mlp_ratio),
            "activation": self.activation,
            "initializers": BlockInitializers.scaled(INIT_STD, self.depth),
            "attention_bias": self.attention_bias,
            "gated_mlp": self.gated_mlp,
            "implementation": self.implementation,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

    def _masks(self) -> tuple[tuple[np.ndarray, ...], tuple[int, ...]]:
        """The different masks, each [L L], and which of them each layer has."""
        types = self.layer_types
        different = tuple(dict.fromkeys(types))
        geometry = self.text_block - 1, tuple(self.image_grid), self.conv_kernel, self.conv_edge
        masks = tuple(attention_mask(layer_type, *geometry) for layer_type in different)
        return masks, tuple(different.index(layer_type) for layer_type in types)

    def _layer_masks(self) -> list[np.ndarray]:
        """Each layer's mask."""
        masks, kinds = self._masks()
        return [masks[kind] for kind in kinds]

    def _check_lengths(self, text: Array, image_tokens: Array | None) -> None:
        """Raises ValueError unless captions and pictures have the network's lengths."""
        if text.shape[1] != self.text_length:
            raise ValueError(f"captions have {text.shape[1]} tokens, the network's text_length is {self.text_length}")
        if image_tokens is not None and image_tokens.shape[1] != self.image_length:
            raise ValueError(
                f"pictures have {image_tokens.shape[1]} tokens, image_grid {self.image_grid} has {self.image_length}"
            )
