"""The self-attention layer, with a key/value cache for decoding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from models.layers.attention import Mask, attend, attend_from_one, keep_weights, pad_length
from models.layers.dense import DenseGeneral
from models.layers.rotary import RotaryEmbedding

Initializer = nn.initializers.Initializer


@struct.dataclass
class KeyValueCache:
    """Keys and values of every position that a layer has read; positions not yet read hold zeros.

    Attributes:
      key: [B L N K], of as many heads as the layer has of keys.
      value: [B L N K].
    """

    key: Float[Array, "b l n k"]
    value: Float[Array, "b l n k"]


class SelfAttention(nn.Module):
    """Multi-head self-attention with a joint query/key/value projection, or of grouped queries with two projections.

    Attributes:
      width: input and output width D.
      heads: number of heads N.
      head_dim: width K of one head; N K need not be D.
      kv_heads: number of heads of keys and values, which divides N (see `attend`): queries then have a projection of
        their own. None for as many as there are queries, projected together with them.
      rotary: how positions turn queries and keys; None for not at all.
      kernel_init: initializer of the query/key/value projection.
      out_init: initializer of the output projection.
      bias_init: initializer of the biases of both.
      use_bias: whether the query/key/value projection has a bias.
      out_bias: whether the output projection has one.
      implementation: see `attend`; of `__call__`.
      dropout: see there; of `__call__` with keys.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    width: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    rotary: RotaryEmbedding | None = None
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_init: Initializer = nn.initializers.normal(0.02)
    bias_init: Initializer = nn.initializers.zeros_init()
    use_bias: bool = True
    out_bias: bool = True
    implementation: str = "auto"
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        project = functools.partial(
            DenseGeneral,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        if self.kv_heads is None:
            self.query_key_value = project((3, self.heads, self.head_dim))
        else:
            if self.kv_heads < 1 or self.heads % self.kv_heads:
                raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
            self.query = project((self.heads, self.head_dim))
            self.key_value = project((2, self.kv_heads, self.head_dim))
        self.out = DenseGeneral(
            self.width,
            axis=(-2, -1),
            use_bias=self.out_bias,
            kernel_init=self.out_init,
            bias_init=self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Mask | None = None,
        positions: Int[Array, "*b l"] | None = None,
        dropout_keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Attends within x. `mask` and keys as in `attend`; `positions` if it is rotary, None for 0, 1, 2, ..."""
        q, k, v = self._project(x, positions)
        if self.kv_heads is None:
            keep_weights(self, q, k, mask)
        # Parameters do not depend on the kernel, and may be made or counted where it cannot run.
        implementation = "xla" if self.is_initializing() else self.implementation
        return self.out(attend(q, k, v, mask, implementation, self.dropout, dropout_keys))

    def read(
        self, query: Float[Array, "b d"], x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b d"]:
        """Attends from one position an example, whose input is `query`, to all of x; `mask` as in `attend_from_one`.

        Much less work than `__call__` where the other positions' outputs are not needed. Its attention is the plain
        one, whatever `implementation` says. Of a layer with a joint projection, that is not rotary.
        """
        params = self.query_key_value.variables["params"]
        kernel = params["kernel"].astype(self.dtype)
        q = jnp.einsum("bd,dnk->bnk", query, kernel[:, 0])
        bias = params["bias"].astype(self.dtype) if self.use_bias else jnp.zeros(3, self.dtype)
        y = attend_from_one(q + bias[0], x, kernel[:, 1], kernel[:, 2], mask) + bias[2]
        return self.out(y)

    def prefill(
        self, x: Float[Array, "b l d"], mask: Mask | None, length: int
    ) -> tuple[Float[Array, "b l d"], KeyValueCache]:
        """As `__call__`, and returns the keys and values in a cache with room for `length` positions.

        Attention is the plain one here and in `decode`, whatever `implementation` says: a network that was trained with
        a fused kernel decodes on any device, and one query against a long cache has nothing to gain from one.
        """
        q, k, v = self._project(x, None)
        y = self.out(attend(q, k, v, mask))
        return y, KeyValueCache(pad_length(k, length), pad_length(v, length))

    def decode(
        self,
        x: Float[Array, "b 1 d"],
        mask: Mask,
        position: Int[Array, ""],
        cache: KeyValueCache,
        positions: Int[Array, "b 1"] | None = None,
    ) -> tuple[Float[Array, "b 1 d"], KeyValueCache]:
        """Attends from one new position to the cache.

        Args:
          x: the new position's state.
          mask: its row of the mask, [1 L]; it must hide what is not yet read.
          position: its index, at which the cache is written.
          cache: of all L positions.
          positions: if it is rotary, that of each example, which pads before it in the cache do not count; None for
            `position`.

        Returns:
          (output, the cache with the new position in it).
        """
        q, k, v = self._project(x, jnp.reshape(position, 1) if positions is None else positions)
        key = jax.lax.dynamic_update_slice_in_dim(cache.key, k.astype(cache.key.dtype), position, axis=1)
        value = jax.lax.dynamic_update_slice_in_dim(cache.value, v.astype(cache.value.dtype), position, axis=1)
        return self.out(attend(q, key, value, mask)), KeyValueCache(key, value)

    def _project(self, x: Array, positions: Array | None) -> tuple[Array, Array, Array]:
        """Queries [B L N K], keys and values, both [B L H K]."""
        if self.kv_heads is None:
            joint = self.query_key_value(x)
            q, k, v = joint[..., 0, :, :], joint[..., 1, :, :], joint[..., 2, :, :]
        else:
            q, both = self.query(x), self.key_value(x)
            k, v = both[..., 0, :, :], both[..., 1, :, :]
        if self.rotary is None:
            return q, k, v
        positions = jnp.arange(x.shape[1]) if positions is None else positions
        return self.rotary.turn(q, positions), self.rotary.turn(k, positions), v
