"""A layer through which a language model looks at pictures, and which starts as the identity.

Dubey et al. 2024, "The Llama 3 Herd of Models", section 7.2; the gates are Flamingo's (Alayrac et al. 2022, 3.2).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from models.layers.attention import attend
from models.layers.dense import DenseGeneral, DenseParts
from models.layers.mlp import GatedMLP
from models.layers.normalization import RMSNorm
from models.layers.partitioning import shard_rows
from models.layers.self_attention import KeyValueCache
from models.layers.transformer import gated

Initializer = nn.initializers.Initializer


class GroupedCrossAttention(nn.Module):
    """Grouped-query attention to other features, with normalized queries and keys, and without biases and positions.

    Attributes:
      width: input and output width D.
      heads: heads of queries N.
      kv_heads: heads of keys and values, which divides N.
      head_dim: width K of one head.
      kernel_init: initializer of the kernels.
      implementation: see `models.layers.attention.attend`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    kernel_init: Initializer = nn.initializers.normal(0.02)
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = {"use_bias": False, "kernel_init": self.kernel_init, **types}
        self.query = DenseGeneral((self.heads, self.head_dim), **dense)
        self.key_value = DenseParts((2, self.kv_heads, self.head_dim), **dense)
        self.query_norm = RMSNorm(**types)
        self.key_norm = RMSNorm(**types)
        self.out = DenseGeneral(self.width, axis=(-2, -1), **dense)

    def remember(self, context: Float[Array, "b m e"]) -> KeyValueCache:
        """Keys and values of what is attended to: once for any number of queries."""
        key, value = self.key_value(context)
        return KeyValueCache(self.key_norm(key), value)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        memory: KeyValueCache,
        mask: Bool[Array, "b 1 l m"],
        seeing: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Attends from x to a memory.

        Args:
          x: the states that ask.
          memory: from `remember`.
          mask: True = attend.
          seeing: which states are told an answer; None for all.
        """
        implementation = "xla" if self.is_initializing() else self.implementation
        y = attend(self.query_norm(self.query(x)), memory.key, memory.value, mask, implementation)
        if seeing is not None:
            y = jnp.where(seeing[:, :, None, None], y, jnp.zeros((), y.dtype))
        return self.out(y)


class GatedCrossBlock(nn.Module):
    """x + tanh(a) attention(x), then x + tanh(b) mlp(x): RMSNorm before both, gates a and b that start at 0.

    A state that sees nothing keeps its value: both sums add zeros to it.

    Attributes:
      width: D.
      heads: heads of queries N.
      kv_heads: heads of keys and values.
      head_dim: width K of one head.
      mlp_hidden: width between the layers of the feed-forward block (SwiGLU).
      blind_attention: states that see nothing are still told what attention to all there is makes, as in transformers
        until at least 5.24; their feed-forward block is left out in any case.
      kernel_init: initializer of the kernels.
      implementation: see `models.layers.attention.attend`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_hidden: int
    blind_attention: bool = False
    kernel_init: Initializer = nn.initializers.normal(0.02)
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.attention_norm = RMSNorm(**types)
        self.attention = GroupedCrossAttention(
            self.width, self.heads, self.kv_heads, self.head_dim, self.kernel_init, self.implementation, **types
        )
        self.mlp_norm = RMSNorm(**types)
        kernels = {"kernel_init": self.kernel_init, "out_init": self.kernel_init}
        self.mlp = GatedMLP(self.mlp_hidden, "silu", use_bias=False, **kernels, **types)
        zeros = nn.initializers.zeros_init()
        self.attention_gate = self.param("attention_gate", zeros, (1,), self.param_dtype)
        self.mlp_gate = self.param("mlp_gate", zeros, (1,), self.param_dtype)

    def remember(self, context: Float[Array, "b m e"]) -> KeyValueCache:
        """Keys and values of what is looked at."""
        return self.attention.remember(context)

    def __call__(
        self, x: Float[Array, "b l d"], memory: KeyValueCache, mask: Bool[Array, "b l m"]
    ) -> Float[Array, "b l d"]:
        """Applies the layer; `mask` says what of the memory each state sees, which may be nothing."""
        seeing = mask.any(axis=-1)
        if self.blind_attention:
            mask, told = mask | ~seeing[..., None], None
        else:
            told = seeing
        y = self.attention(self.attention_norm(x), memory, mask[:, None], told)
        x = shard_rows(x + gated(y, self.attention_gate))
        y = jnp.where(seeing[..., None], self.mlp(self.mlp_norm(x)), jnp.zeros((), x.dtype))
        return shard_rows(x + gated(y, self.mlp_gate))
