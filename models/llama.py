"""The language model of Llama 3 (Dubey et al. 2024, "The Llama 3 Herd of Models", section 3.2).

A causal transformer with RMSNorm before each block (Zhang and Sennrich 2019), grouped-query attention (Ainslie et al.
2023), rotary positions (Su et al. 2021) and a gated feed-forward block (SwiGLU, Shazeer 2020), without any bias.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from models.layers.dense import Dense
from models.layers.normalization import RMSNorm
from models.layers.partitioning import shard_rows
from models.layers.prompt_cache import PromptCache, causal_mask, last_state
from models.layers.rotary import RotaryEmbedding
from models.layers.self_attention import KeyValueCache
from models.layers.transformer import Block, BlockInitializers, apply_blocks, check_remat

INIT_STD = 0.02


class Llama(nn.Module):
    """Scores every token of a text given the tokens before it.

    Weights and embeddings start at N(0, 0.02^2), norms at 1.

    Attributes:
      text_vocab_size: V, ids of the tokenizer.
      width: D.
      depth: number of layers.
      heads: heads of queries N.
      kv_heads: heads of keys and values, which divides N.
      mlp_hidden: width between the layers of the feed-forward block.
      head_dim: width K of one head; None for width // heads.
      rope_theta: see `models.layers.rotary.RotaryEmbedding`, as the next four.
      rope_factor: published 8 for Llama 3.1 and 32 for the small ones of 3.2; 1 for Llama 3.
      rope_low_factor: see there.
      rope_high_factor: see there.
      rope_original_length: see there.
      tied: whether the head is the table of embeddings, as in the small ones of 3.2.
      text_end_id: the tokenizer's end of a text, at which answers stop; None where it is not known.
      text_stop_ids: other ids at which answers stop.
      text_pad_id: what the tokenizer fills texts up with.
      implementation: see `models.layers.attention.attend`.
      scan: see `models.layers.transformer.apply_blocks`.
      remat: see there.
      dtype: of the computation; statistics, angles, scores, softmax and logits are float32 in any case.
      param_dtype: of the parameters.
    """

    # A text's ends are the tokenizer's, and no weight depends on them: a run may go on with another way to talk.
    ADAPTABLE: ClassVar[tuple[str, ...]] = ("text_end_id", "text_stop_ids", "text_pad_id")

    text_vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_hidden: int
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
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def adapt(self, params: Any, theirs: "Llama") -> Any:
        """Parameters of a network that differs in `ADAPTABLE`, as they are."""
        del theirs
        return params

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`; texts of another length do as well."""
        return (jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),)

    def setup(self) -> None:
        check_remat(self.remat)
        head_dim = self.head_dim or self.width // self.heads
        if head_dim % 2 or (self.head_dim is None and self.width % self.heads):
            raise ValueError(f"heads={self.heads} of width={self.width} must have an even width; give head_dim")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(INIT_STD)
        self.embedding = nn.Embed(self.text_vocab_size, self.width, embedding_init=init, **types)
        self.blocks = [
            Block(
                width=self.width,
                heads=self.heads,
                head_dim=head_dim,
                mlp_hidden=self.mlp_hidden,
                activation="silu",
                initializers=BlockInitializers(init, init, init, init),
                kv_heads=self.kv_heads,
                rotary=self.rotary,
                norm="rms",
                attention_bias=False,
                attention_out_bias=False,
                gated_mlp=True,
                mlp_bias=False,
                implementation=self.implementation,
                **types,
            )
            for _ in range(self.depth)
        ]
        self.final_norm = RMSNorm(**types)
        if not self.tied:
            head = {"kernel_init": init, "dtype": jnp.float32, "param_dtype": self.param_dtype}
            self.text_head = Dense(self.text_vocab_size, use_bias=False, **head)

    @property
    def rotary(self) -> RotaryEmbedding:
        """How positions turn queries and keys."""
        scaling = self.rope_factor, self.rope_low_factor, self.rope_high_factor, self.rope_original_length
        return RotaryEmbedding(self.rope_theta, *scaling)

    def __call__(
        self,
        tokens: Int[Array, "b l"],
        positions: Int[Array, "b l"] | None = None,
        segments: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l v"]:
        """Scores the token behind each one; float32.

        Args:
          tokens: ids; pads go behind.
          positions: of each token; None for 0, 1, 2, ...
          segments: which of several texts in a row a token is of; a token sees its own text alone. None for one text.
        """
        x = self.apply_layers(self.embed(tokens), 0, self.depth, causal_mask(tokens.shape[1], segments), positions)
        return self.logits(x)

    def embed(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """The first state of each token."""
        return shard_rows(self.embedding(tokens))

    def apply_layers(
        self,
        x: Float[Array, "b l d"],
        start: int,
        stop: int,
        mask: Bool[Array, "..."] | Bool[np.ndarray, "..."],
        positions: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Applies the layers from `start` to before `stop`, under one mask."""
        blocks = self.blocks[start:stop]
        return apply_blocks(blocks, x, [mask], [0] * len(blocks), None, positions, scan=self.scan, remat=self.remat)

    def logits(self, x: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Float32 scores of the next token, of the last layer's state."""
        x = self.final_norm(x)
        if not self.tied:
            return shard_rows(self.text_head(x))
        # In float32 whatever the blocks compute in, as a head of its own.
        return shard_rows(x.astype(jnp.float32) @ self.embedding.embedding.astype(jnp.float32).T)

    def prefill(
        self, tokens: Int[Array, "b t"], length: int, lengths: Int[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b v"], PromptCache]:
        """Reads prompts in one parallel pass.

        Args:
          tokens: ids, pads behind.
          length: how many tokens will be made at most.
          lengths: tokens of each prompt, at least 1; None for all T.

        Returns:
          (scores of the first token that is made, the cache with the prompts in it).
        """
        prompts = tokens.shape[1]
        x, layers = self.prefill_layers(self.embed(tokens), 0, self.depth, prompts + length)
        lengths = jnp.full(len(tokens), prompts, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        return self.logits(last_state(x, lengths))[:, 0], PromptCache(tuple(layers), lengths, prompts)

    def decode_step(
        self, token: Int[Array, "r"], position: Int[Array, ""], cache: PromptCache
    ) -> tuple[Float[Array, "r v"], PromptCache]:
        """Reads token `position` of those that are made (0 is the first) and scores the next one.

        Args:
          token: of each row.
          position: its index.
          cache: from `prefill` or the step before.
        """
        x, layers = self.decode_layers(self.embed(token[:, None]), 0, self.depth, position, cache)
        return self.logits(x)[:, 0], PromptCache(tuple(layers), cache.lengths, cache.prompt_length)

    def prefill_layers(
        self, x: Float[Array, "b t d"], start: int, stop: int, places: int
    ) -> tuple[Float[Array, "b t d"], list[KeyValueCache]]:
        """As `apply_layers` of a prompt, and starts the caches of those layers, of so many places."""
        mask, layers = causal_mask(x.shape[1]), []
        for block in self.blocks[start:stop]:
            x, layer = block.prefill(x, mask, places)
            layers.append(layer)
        return x, layers

    def decode_layers(
        self, x: Float[Array, "r 1 d"], start: int, stop: int, position: Int[Array, ""] | int, cache: PromptCache
    ) -> tuple[Float[Array, "r 1 d"], list[KeyValueCache]]:
        """Applies layers to one new token of each row."""
        position = jnp.asarray(position, jnp.int32)
        seen, place = cache.seen(position), cache.prompt_length + position
        positions, layers = (cache.lengths + position)[:, None], []
        for block, layer in zip(self.blocks[start:stop], cache.layers[start:stop], strict=True):
            x, layer = block.decode(x, seen, place, layer, positions)
            layers.append(layer)
        return x, layers
