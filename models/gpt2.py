"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3).

A causal transformer with LayerNorm before each block and behind the last, learned positions, and a head that is the
table of embeddings. It may also read a prefix of vectors in place of tokens, as captioners give it one (Mokady et al.
2021, "ClipCap", section 3.1).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from models.layers.dropout import drop
from models.layers.mlp import ACTIVATIONS
from models.layers.normalization import layer_norm
from models.layers.partitioning import shard_rows
from models.layers.prompt_cache import PromptCache, causal_mask, last_state
from models.layers.transformer import Block, BlockInitializers, apply_blocks, check_remat, fold_keys

INIT_STD = 0.02


class GPT2(nn.Module):
    """Scores every token of a text given the tokens before it.

    Weights and embeddings start at N(0, 0.02^2), projections into the residual stream at N(0, 0.02^2 / (2 depth)),
    biases at 0. Parameters: V D + length D + depth (12 D^2 + 13 D) + 2 D.

    Attributes:
      text_vocab_size: V, ids of the tokenizer.
      length: positions that there are; a prefix takes its share of them.
      width: D.
      depth: number of layers.
      heads: number of heads, which divides D.
      mlp_hidden: width between the layers of the feed-forward block; None for 4 D.
      activation: see `models.layers.mlp.ACTIVATIONS`; "gelu_tanh" where published.
      dropout: where a call has keys: of the first states, attention's weights, and what each block adds; published 0.1.
      implementation: see `models.layers.attention.attend`.
      scan: see `models.layers.transformer.apply_blocks`.
      remat: see there.
      dtype: of the computation; statistics, scores, softmax and logits are float32 in any case.
      param_dtype: of the parameters.
    """

    text_vocab_size: int
    length: int
    width: int
    depth: int
    heads: int
    mlp_hidden: int | None = None
    activation: str = "gelu_tanh"
    dropout: float = 0.0
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        # Filled in, so that equal networks have equal fields.
        if self.mlp_hidden is None:
            self.mlp_hidden = 4 * self.width
        super().__post_init__()

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`; texts of another length do as well."""
        return (jax.ShapeDtypeStruct((batch_size, min(2, self.length)), jnp.int32),)

    # What a network that is trained further may have more of; see `adapt`.
    ADAPTABLE: ClassVar[tuple[str, ...]] = ("text_vocab_size",)

    def adapt(self, params: Mapping[str, Any], trained: "GPT2") -> dict[str, Any]:
        """Parameters to start from, of a network with fewer ids: new ones begin at the mean of the others.

        Raises:
          ValueError: if it has more.
        """
        table = jnp.asarray(params["embedding"]["embedding"])
        more = self.text_vocab_size - trained.text_vocab_size
        if more < 0:
            raise ValueError(f"a table of {trained.text_vocab_size} ids is not cut to {self.text_vocab_size}")
        new = jnp.broadcast_to(jnp.mean(table, axis=0), (more, self.width))
        return {**params, "embedding": {"embedding": jnp.concatenate([table, new])}}

    def setup(self) -> None:
        check_remat(self.remat)
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads} must be at least 1 and divide width={self.width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(INIT_STD)
        self.embedding = nn.Embed(self.text_vocab_size, self.width, embedding_init=init, **types)
        self.position = nn.Embed(self.length, self.width, embedding_init=init, **types)
        self.blocks = [
            Block(
                width=self.width,
                heads=self.heads,
                head_dim=self.width // self.heads,
                mlp_hidden=self.mlp_hidden,
                activation=self.activation,
                initializers=BlockInitializers.scaled(INIT_STD, self.depth),
                implementation=self.implementation,
                dropout=self.dropout,
                **types,
            )
            for _ in range(self.depth)
        ]
        self.final_norm = layer_norm(**types)

    def __call__(
        self,
        tokens: Int[Array, "b l"],
        prefix: Float[Array, "b p d"] | None = None,
        dropout_keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b s {self.text_vocab_size}"]:
        """Scores the token behind each vector of the prefix and each token; float32.

        Args:
          tokens: ids; pads go behind.
          prefix: vectors that stand before them, at the first positions; None for none.
          dropout_keys: one an example, in training; None drops nothing.

        Raises:
          ValueError: if there are more than positions.
        """
        x = self._embed(tokens, prefix)
        keys = dropout_keys if self.dropout else None
        if keys is not None:
            x = drop(x, self.dropout, fold_keys(keys, self.depth))  # each layer has its own number
        mask, how = causal_mask(x.shape[1]), {"scan": self.scan, "remat": self.remat, "dropout_keys": keys}
        x = apply_blocks(self.blocks, x, [mask], [0] * self.depth, **how)
        return self.logits(x)

    def logits(self, x: Float[Array, "b l d"]) -> Float[Array, "b l {self.text_vocab_size}"]:
        """Float32 scores of the next token, of the last layer's state."""
        # In float32 whatever the blocks compute in, as a head of its own.
        table = self.embedding.embedding.astype(jnp.float32)
        return shard_rows(self.final_norm(x).astype(jnp.float32) @ table.T)

    def prefill(
        self,
        tokens: Int[Array, "b t"],
        length: int,
        lengths: Int[Array, "b"] | None = None,
        prefix: Float[Array, "b p d"] | None = None,
    ) -> tuple[Float[Array, "b v"], PromptCache]:
        """Reads prefixes and prompts in one parallel pass.

        Args:
          tokens: ids, pads behind; of length 0 where the prefix is the prompt.
          length: how many tokens will be made at most.
          lengths: tokens of each prompt, the prefix not counted; at least 1 without one; None for all T.
          prefix: as in `__call__`.

        Returns:
          (scores of the first token that is made, the cache with the prompts in it).

        Raises:
          ValueError: if there are more than positions, with what is made.
        """
        x = self._embed(tokens, prefix, length - 1)
        prompts = x.shape[1]
        before = prompts - tokens.shape[1]
        count = tokens.shape[1] if lengths is None else lengths.astype(jnp.int32)
        read = jnp.full(len(tokens), before, jnp.int32) + count
        mask, layers = causal_mask(prompts), []
        for block in self.blocks:
            x, layer = block.prefill(x, mask, prompts + length)
            layers.append(layer)
        return self.logits(last_state(x, read))[:, 0], PromptCache(tuple(layers), read, prompts)

    def decode_step(
        self, token: Int[Array, "r"], position: Int[Array, ""] | int, cache: PromptCache
    ) -> tuple[Float[Array, "r v"], PromptCache]:
        """Reads token `position` of those that are made (0 is the first) and scores the next one.

        Args:
          token: of each row.
          position: its index.
          cache: from `prefill` or the step before.
        """
        position = jnp.asarray(position, jnp.int32)
        x = shard_rows((self.embedding(token) + self.position(cache.lengths + position))[:, None])
        seen, place, layers = cache.seen(position), cache.prompt_length + position, []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, layer = block.decode(x, seen, place, layer)
            layers.append(layer)
        return self.logits(x)[:, 0], PromptCache(tuple(layers), cache.lengths, cache.prompt_length)

    def _embed(self, tokens: Array, prefix: Array | None, made: int = 0) -> Array:
        """First states of a prefix and tokens, with their positions; as many others as are made follow."""
        x = self.embedding(tokens)
        if prefix is not None:
            x = jnp.concatenate([prefix.astype(x.dtype), x], axis=1)
        if x.shape[1] + made > self.length:
            raise ValueError(f"{x.shape[1] + made} tokens are read, and the network's length is {self.length}")
        return shard_rows(x + self.position(jnp.arange(x.shape[1])))
