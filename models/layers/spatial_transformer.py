"""Transformer layers over the pixels of a feature map that may read a context, such as a caption's features.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3 and appendix E.2.1.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from models.layers.attention import KeyLengths, attend, keep_weights
from models.layers.convolution import Conv
from models.layers.dense import Dense, DenseGeneral, DenseParts
from models.layers.group_norm_resnet import KERNEL_INITS, group_norm
from models.layers.mlp import GatedMLP
from models.layers.normalization import layer_norm
from models.layers.partitioning import shard_rows

MLP_RATIO = 4
ContextMask = Bool[Array, "b m"] | KeyLengths


class ContextAttention(nn.Module):
    """Multi-head attention from one sequence to another; the output has a bias.

    Attributes:
      heads: number of heads N; they share the width of the queries' sequence.
      kernel_init: an initializer, or a key of `KERNEL_INITS`.
      out_init: of the output's kernel; None for the same.
      use_bias: whether queries, keys and values have a bias.
      implementation: see `models.layers.attention.attend`.
      dtype: of the computation; scores and softmax are float32.
      param_dtype: of the parameters.
    """

    heads: int
    kernel_init: str | nn.initializers.Initializer = "fan_in"
    out_init: nn.initializers.Initializer | None = None
    use_bias: bool = False
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], context: Float[Array, "b m e"], mask: ContextMask | None = None
    ) -> Float[Array, "b l d"]:
        """Attends from `x` to `context`.

        Args:
          x: asks.
          context: answers; `x` itself for self-attention.
          mask: True where the context is to be seen, or how much of it is; where an example has none of it, it reads
            zeros.
        """
        width = x.shape[-1]
        init = KERNEL_INITS[self.kernel_init] if isinstance(self.kernel_init, str) else self.kernel_init
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = {"kernel_init": init, "use_bias": self.use_bias, **types}
        head = (self.heads, width // self.heads)
        query = DenseGeneral(head, name="query", **dense)(x)
        key, value = DenseParts((2, *head), name="key_value", **dense)(context)
        # Parameters do not depend on the kernel, and may be made or counted where it cannot run.
        implementation = "xla" if self.is_initializing() else self.implementation
        lengths = isinstance(mask, KeyLengths)
        seen = mask if mask is None or lengths else mask[:, None, None]
        keep_weights(self, query, key, seen)
        y = attend(query, key, value, seen, implementation)
        if mask is not None:
            sees = mask.lengths > 0 if lengths else mask.any(axis=1)
            y = jnp.where(sees[:, None, None, None], y, jnp.zeros((), y.dtype))
        return DenseGeneral(width, axis=(-2, -1), kernel_init=self.out_init or init, name="out", **types)(y)


def caption_attention(kept: Mapping[str, Any], height: int, width: int) -> tuple[Float[Array, "b _h _w m"], ...]:
    """What the pixels of feature maps read of a context, in the order of the layers' names: one for each layer.

    Args:
      kept: the collection "intermediates" of a network that reads its context in modules `context_attention`.
      height: of what the network is given, in pixels of it; feature maps are smaller by a factor a side.
      width: of the same.

    Returns:
      Weights over the context, which sum to 1.
    """
    maps = []
    for path, weights in jax.tree_util.tree_leaves_with_path(kept):
        if jax.tree_util.DictKey("context_attention") in path:
            factor = math.isqrt(height * width // weights.shape[1])
            maps.append(weights.reshape(len(weights), height // factor, width // factor, -1))
    return tuple(maps)


class ContextBlock(nn.Module):
    """A pre-normalization layer: self-attention, attention to the context, and a gated feed-forward block (GEGLU).

    Attributes:
      heads, kernel_init, implementation, dtype, param_dtype: as in `ContextAttention`; LayerNorm has float32 statistics
        and epsilon 1e-5.
    """

    heads: int
    kernel_init: str = "fan_in"
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], context: Float[Array, "b m e"] | None, mask: ContextMask | None = None
    ) -> Float[Array, "b l d"]:
        """Applies the layer; without a context the second attention is to `x` too."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = {"heads": self.heads, "kernel_init": self.kernel_init, "implementation": self.implementation}
        init = KERNEL_INITS[self.kernel_init]
        y = layer_norm(name="self_norm", **types)(x)
        x = shard_rows(x + ContextAttention(name="self_attention", **attention, **types)(y, y))
        y = layer_norm(name="context_norm", **types)(x)
        read = y if context is None else context
        x = shard_rows(x + ContextAttention(name="context_attention", **attention, **types)(y, read, mask))
        y = layer_norm(name="mlp_norm", **types)(x)
        hidden = MLP_RATIO * x.shape[-1]
        mlp = GatedMLP(hidden, activation="gelu", kernel_init=init, out_init=init, name="mlp", **types)
        return shard_rows(x + mlp(y))


class SpatialTransformer(nn.Module):
    """x + layers over its normalized pixels, between two projections, the last of which starts at 0.

    Attributes:
      heads: number of heads N.
      depth: number of layers.
      linear_projection: the projections are dense layers, as Stable Diffusion 2 stores them; else 1x1 convolutions,
        which compute the same.
      groups: of the norm, whose epsilon is 1e-6.
      kernel_init: a key of `KERNEL_INITS`.
      implementation: see `models.layers.attention.attend`.
      dtype: of the computation; statistics, scores and softmax are float32.
      param_dtype: of the parameters.
    """

    heads: int
    depth: int = 1
    linear_projection: bool = False
    groups: int = 32
    kernel_init: str = "fan_in"
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b m e"] | None, mask: ContextMask | None = None
    ) -> Float[Array, "b h w c"]:
        """Applies the block; `context` and `mask` as in `ContextBlock`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        fields = {"kernel_init": self.kernel_init, "implementation": self.implementation, **types}
        y = group_norm(self.groups, 1e-6, name="norm", **types)(x)
        y = self._projection(y, KERNEL_INITS[self.kernel_init], "input")
        y = y.reshape(len(x), -1, x.shape[-1])
        for i in range(self.depth):
            y = ContextBlock(self.heads, name=f"blocks_{i}", **fields)(y, context, mask)
        y = self._projection(y.reshape(x.shape), nn.initializers.zeros_init(), "output")
        return shard_rows(x + y)

    def _projection(self, x: Array, init: jax.nn.initializers.Initializer, name: str) -> Array:
        """A dense layer over channels, in one of two shapes."""
        fields = {"kernel_init": init, "dtype": self.dtype, "param_dtype": self.param_dtype, "name": name}
        if self.linear_projection:
            return Dense(x.shape[-1], **fields)(x)
        return Conv(x.shape[-1], (1, 1), **fields)(x)
