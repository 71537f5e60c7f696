"""The transformer layer, of norms before or behind its blocks, and stacks of it that are scanned and recomputed."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from models.layers.attention import Mask, MaskChoice
from models.layers.dropout import drop
from models.layers.mlp import MLP, GatedMLP
from models.layers.normalization import AdaptiveLayerNorm, RMSNorm, layer_norm
from models.layers.partitioning import shard_rows
from models.layers.rotary import RotaryEmbedding
from models.layers.self_attention import KeyValueCache, SelfAttention

Initializer = nn.initializers.Initializer

NORMS: dict[str, Callable[..., nn.Module]] = {"layer": layer_norm, "rms": RMSNorm}

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockInitializers:
    """How a layer's parameters start; biases that are not named start at 0.

    Attributes:
      attention: kernel of the query/key/value projection.
      attention_out: kernel of attention's output projection.
      mlp: kernel of the first dense layer.
      mlp_out: kernel of the second one.
      mlp_bias: bias of the first one.
      mlp_out_bias: bias of the second one.
    """

    attention: Initializer
    attention_out: Initializer
    mlp: Initializer
    mlp_out: Initializer
    mlp_bias: Initializer = nn.initializers.zeros_init()
    mlp_out_bias: Initializer = nn.initializers.zeros_init()

    @classmethod
    def scaled(cls, std: float, depth: int) -> "BlockInitializers":
        """N(0, std^2), projections into the residual stream smaller by sqrt(2 depth) (Radford et al. 2019)."""
        into, out = nn.initializers.normal(std), nn.initializers.normal(std / (2 * depth) ** 0.5)
        return cls(attention=into, attention_out=out, mlp=into, mlp_out=out)


class Block(nn.Module):
    """A transformer layer; norms have float32 statistics and epsilon 1e-5.

    Raises ValueError when called with a condition that it was not built for, or without the one that it was, and if
    there is no such norm.

    Attributes:
      width: D.
      heads: number of heads N.
      head_dim: width K of one head.
      mlp_hidden: hidden width of the feed-forward block.
      activation: see `models.layers.mlp.ACTIVATIONS`.
      initializers: of the parameters.
      kv_heads: of keys and values, see `models.layers.self_attention.SelfAttention`.
      rotary: see there.
      norm: "layer" for LayerNorm, "rms" for RMSNorm; not of an adaptive layer.
      attention_bias: whether the query/key/value projection has one.
      attention_out_bias: whether attention's output projection has one.
      gated_mlp: the feed-forward block is a `GatedMLP`; `initializers` of its biases are not used.
      mlp_bias: whether a gated feed-forward block has biases; a plain one has.
      residual_gates: what attention and the feed-forward block add is multiplied by tanh of a number each, which
        starts at 0, so that the layer starts as the identity (Alayrac et al. 2022, section 3.2).
      post_norm: norms stand behind each sum, x = norm(x + block(x)), as in Vaswani et al. 2017; otherwise before each
        block, x + block(norm(x)). Not of an adaptive layer.
      adaptive: a condition scales and shifts what both norms return (`AdaptiveLayerNorm`); only `__call__` takes one.
      implementation: see `models.layers.attention.attend`.
      dropout: of attention's weights, and of what attention and the feed-forward block add, where `__call__` has keys.
      dtype: of the computation; LayerNorm statistics, attention scores and softmax are float32 in any case.
      param_dtype: of the parameters.
    """

    width: int
    heads: int
    head_dim: int
    mlp_hidden: int
    activation: str
    initializers: BlockInitializers
    kv_heads: int | None = None
    rotary: RotaryEmbedding | None = None
    norm: str = "layer"
    attention_bias: bool = True
    attention_out_bias: bool = True
    gated_mlp: bool = False
    mlp_bias: bool = True
    residual_gates: bool = False
    post_norm: bool = False
    adaptive: bool = False
    implementation: str = "auto"
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inits = self.initializers
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; choose one of {', '.join(NORMS)}")
        if self.post_norm and self.adaptive:
            raise ValueError("an adaptive layer has its norms before the blocks; set post_norm=False")
        norm: Any = functools.partial(AdaptiveLayerNorm if self.adaptive else NORMS[self.norm], **types)
        self.attention_norm = norm()
        self.attention = SelfAttention(
            self.width,
            self.heads,
            self.head_dim,
            self.kv_heads,
            self.rotary,
            kernel_init=inits.attention,
            out_init=inits.attention_out,
            use_bias=self.attention_bias,
            out_bias=self.attention_out_bias,
            implementation=self.implementation,
            dropout=self.dropout,
            **types,
        )
        self.mlp_norm = norm()
        kernels = {"kernel_init": inits.mlp, "out_init": inits.mlp_out}
        if self.gated_mlp:
            self.mlp = GatedMLP(self.mlp_hidden, self.activation, use_bias=self.mlp_bias, **kernels, **types)
        else:
            biases = {"bias_init": inits.mlp_bias, "out_bias_init": inits.mlp_out_bias}
            self.mlp = MLP(self.mlp_hidden, self.activation, **kernels, **biases, **types)
        if self.residual_gates:
            zeros = nn.initializers.zeros_init()
            self.attention_gate = self.param("attention_gate", zeros, (1,), self.param_dtype)
            self.mlp_gate = self.param("mlp_gate", zeros, (1,), self.param_dtype)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Mask | None = None,
        condition: Float[Array, "b c"] | None = None,
        positions: Int[Array, "*b l"] | None = None,
        dropout_keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Applies the layer; `mask` as in `attend`, `condition` if it is adaptive, `positions` if it is rotary.

        With `dropout_keys`, one an example, of this layer alone, it drops out.
        """
        if self.adaptive != (condition is not None):
            needs, given = ("needs", "none") if self.adaptive else ("takes no", "one")
            raise ValueError(f"a layer with adaptive={self.adaptive} {needs} condition, {given} was given")
        conditions = (condition,) if self.adaptive else ()
        weights, attended, added = (fold_keys(dropout_keys if self.dropout else None, use) for use in range(3))
        y = self.attention(self._attention_input(x, *conditions), mask, positions, weights)
        x = self._add_attention(x, y if attended is None else drop(y, self.dropout, attended))
        return self._add_mlp(x, *conditions, dropout_keys=added)

    def read(
        self, query: Float[Array, "b d"], x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b d"]:
        """What `__call__` makes of one position an example, whose state is `query`: all of a last layer that is read.

        Args:
          query: the state of that position.
          x: the states of all positions.
          mask: True = that position attends; its row of the mask.
        """
        y = self.attention.read(self._attention_input(query), self._attention_input(x), mask)
        return self._add_mlp(self._add_attention(query, y))

    def prefill(
        self, x: Float[Array, "b l d"], mask: np.ndarray, length: int
    ) -> tuple[Float[Array, "b l d"], KeyValueCache]:
        """As `__call__`, and starts a cache of `length` positions."""
        y, cache = self.attention.prefill(self._attention_input(x), mask, length)
        return self._add_mlp(self._add_attention(x, y)), cache

    def decode(
        self,
        x: Float[Array, "b 1 d"],
        mask: Array,
        position: Int[Array, ""],
        cache: KeyValueCache,
        positions: Int[Array, "b 1"] | None = None,
    ) -> tuple[Float[Array, "b 1 d"], KeyValueCache]:
        """Applies the layer to one new position; `mask` [1 L] is its row, `positions` as in `SelfAttention.decode`."""
        y, cache = self.attention.decode(self._attention_input(x), mask, position, cache, positions)
        return self._add_mlp(self._add_attention(x, y)), cache

    def _attention_input(self, x: Array, *conditions: Array) -> Array:
        """What attention reads of the state."""
        return x if self.post_norm else self.attention_norm(x, *conditions)

    def _add_attention(self, x: Array, y: Array) -> Array:
        """The state with what attention makes of it."""
        x = x + (gated(y, self.attention_gate) if self.residual_gates else y)
        return shard_rows(self.attention_norm(x) if self.post_norm else x)

    def _add_mlp(self, x: Array, *conditions: Array, dropout_keys: Array | None = None) -> Array:
        """The state with what the feed-forward block makes of it."""
        y = self.mlp(x if self.post_norm else self.mlp_norm(x, *conditions))
        if dropout_keys is not None:
            y = drop(y, self.dropout, dropout_keys)
        x = x + (gated(y, self.mlp_gate) if self.residual_gates else y)
        return shard_rows(self.mlp_norm(x) if self.post_norm else x)


def fold_keys(keys: Key[Array, "b"] | None, number: Int[Array, ""] | int) -> Key[Array, "b"] | None:
    """Keys of the examples for one use; None of none."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def gated(y: Float[Array, "*b d"], gate: Float[Array, "1"]) -> Float[Array, "*b d"]:
    """Y times tanh of a gate."""
    return y * jnp.tanh(gate).astype(y.dtype)


def check_remat(remat: str) -> None:
    """Raises ValueError unless `remat` is a key of `REMAT`; lists the choices."""
    if remat not in REMAT:
        raise ValueError(f"unknown remat {remat!r}; choose one of {', '.join(REMAT)}")


def apply_blocks(
    blocks: Sequence[Any],
    x: Float[Array, "b l d"],
    masks: Sequence[Any],
    kinds: Sequence[int],
    *told: Any,
    scan: bool = False,
    remat: str = "none",
    dropout_keys: Key[Array, "b"] | None = None,
) -> Float[Array, "b l d"]:
    """Applies layers of one kind in turn.

    Args:
      blocks: layers that are bound to their parameters and differ in these alone; a `Block`, or another module that is
        called with x, a mask and what is told, and has a `dtype`.
      x: the input.
      masks: the different masks that layers have; None for a layer that sees all.
      kinds: which of them each layer has.
      *told: what every layer is called with beside.
      scan: trace and compile one layer for all of them (`jax.lax.scan`). Where parameters are split over devices, they
        are then gathered one layer at a time. The parameters' names and shapes do not depend on it, as they are stacked
        here, in the layers' `dtype`: a copy a call.
      remat: what each layer recomputes in the backward pass, for memory: "none"; "full", all but its input; "dots", all
        but the outputs of its dense layers (`jax.checkpoint_policies.dots_with_no_batch_dims_saveable`).
      dropout_keys: one an example, of which each layer has its own; None for layers that are called without.
    """
    # Without keys a program has nothing of them.
    numbers = None if dropout_keys is None else jnp.arange(len(blocks))

    def keys_of(number: Any) -> dict[str, Any]:
        return {} if dropout_keys is None else {"dropout_keys": fold_keys(dropout_keys, number)}

    if not blocks or blocks[0].is_initializing() or (remat == "none" and not scan):
        for number, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
            x = block(x, masks[kind], *told, **keys_of(number))
        return x

    # Pure functions of their parameters, so that they can be scanned and recomputed.
    layer = blocks[0].clone(parent=None, name=None)
    params = [block.variables["params"] for block in blocks]

    def apply(x: Array, params: Any, number: Any, mask: Any) -> Array:
        return layer.apply({"params": params}, x, mask, *told, **keys_of(number))

    if not scan:
        layers = [rematerialized(functools.partial(apply, mask=mask), remat) for mask in masks]
        for number, (kind, tree) in enumerate(zip(kinds, params, strict=True)):
            x = layers[kind](x, tree, None if numbers is None else numbers[number])
        return x

    def body(x: Array, inputs: tuple[Any, Array, Array | None]) -> tuple[Array, None]:
        params, kind, number = inputs
        return apply(x, params, number, masks[0] if len(masks) == 1 else MaskChoice(tuple(masks), kind)), None

    # Between iterations there are no common subexpressions, so nothing needs to stop their elimination.
    inputs = (stacked_parameters(blocks), jnp.array(kinds), numbers)
    x, _ = jax.lax.scan(rematerialized(body, remat, prevent_cse=False), x, inputs)
    return x


def rematerialized(function: Callable[..., Any], remat: str, prevent_cse: bool = True) -> Callable[..., Any]:
    """A layer's function under a policy of `REMAT`; `prevent_cse` as in `jax.checkpoint`, False inside a scan."""
    if remat == "none":
        return function
    return jax.checkpoint(function, policy=REMAT[remat], prevent_cse=prevent_cse)


def stacked_parameters(blocks: Sequence[Any]) -> Any:
    """Parameters of layers of one kind as one tree, layers first, for `jax.lax.scan`."""
    params = [_cast_dense(block.variables["params"], block.dtype) for block in blocks]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def _cast_dense(params: Any, dtype: DTypeLike) -> Any:
    """A layer's parameters; those of dense layers as these would cast them, so that a copy takes less memory."""
    # LayerNorm computes with the parameters as they are.
    dense = ("attention", "context_attention", "modulation", "mlp")
    return {
        name: jax.tree.map(lambda leaf: leaf.astype(dtype), tree) if name in dense else tree
        for name, tree in params.items()
    }
