"""Long skip connections between the two halves of a stack of transformer layers (Bao et al. 2023, section 3.1)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.layers.attention import Mask
from models.layers.dense import Dense
from models.layers.normalization import layer_norm
from models.layers.partitioning import shard_rows
from models.layers.transformer import Block, rematerialized, stacked_parameters

Initializer = nn.initializers.Initializer

LONG_SKIPS = ("concat", "add", "project_skip", "project_sum", "none")


class LongSkip(nn.Module):
    """Joins the main branch x with the state s of the layer that mirrors the next one.

    Attributes:
      kind: "concat" for Linear([x, s]), which the paper finds best; "add" for x + s; "project_skip" for x + Linear(s);
        "project_sum" for Linear(x + s).
      norm: what is joined is normalized, as between layers with their norms behind (UniDiffuser).
      kernel_init: of the dense layer.
      dtype: of the computation.
      param_dtype: of the parameters.

    Raises:
      ValueError: when called, if there is no such kind.
    """

    kind: str = "concat"
    norm: bool = False
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], skip: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Joins them."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = Dense(x.shape[-1], kernel_init=self.kernel_init, name="projection", **types)
        if self.kind == "add":
            y = x + skip
        elif self.kind == "concat":
            y = project(jnp.concatenate([x, skip], axis=-1))
        elif self.kind == "project_skip":
            y = x + project(skip)
        elif self.kind == "project_sum":
            y = project(x + skip)
        else:
            raise ValueError(f"unknown long skip {self.kind!r}; choose one of {', '.join(LONG_SKIPS[:-1])}")
        return shard_rows(layer_norm(name="norm", **types)(y) if self.norm else y)


def apply_with_long_skips(
    in_blocks: Sequence[Block],
    mid_block: Block,
    out_blocks: Sequence[Block],
    skips: Sequence[LongSkip],
    x: Float[Array, "b l d"],
    mask: Mask | None = None,
    condition: Float[Array, "b c"] | None = None,
    *,
    scan: bool = False,
    remat: str = "none",
) -> Float[Array, "b l d"]:
    """Applies layers in turn; what the i-th layer from the start returns, the i-th from the end joins with its input.

    Args:
      in_blocks: the first half, bound to their parameters.
      mid_block: the layer between the halves; layers differ in their parameters alone.
      out_blocks: the second half, as many.
      skips: one for each layer of the second half; empty for none, and then the halves may differ in length.
      x: the input.
      mask: of every layer, see `models.layers.attention.attend`.
      condition: of every layer, see `models.layers.transformer.Block`.
      scan: trace and compile one layer for each half, as in `models.layers.transformer.apply_blocks`.
      remat: what each layer, with the join before it, recomputes in the backward pass, see there.
    """
    layer = mid_block.clone(parent=None, name=None)
    join = skips[0].clone(parent=None, name=None) if skips else None

    def pure(x: Array, params: Any, skip: Array | None = None, skip_params: Any = None) -> Array:
        if join is not None and skip is not None:
            x = join.apply({"params": skip_params}, x, skip)
        return layer.apply({"params": params}, x, mask, condition)

    initializing = mid_block.is_initializing()
    if scan and not initializing:
        # Between iterations there are no common subexpressions, so nothing needs to stop their elimination.
        step = rematerialized(pure, remat, prevent_cse=False)

        def descend(x: Array, params: Any) -> tuple[Array, Array | None]:
            x = step(x, params)
            return x, (x if skips else None)

        def ascend(x: Array, inputs: tuple[Any, Any, Any]) -> tuple[Array, None]:
            params, skip, skip_params = inputs
            return step(x, params, skip, skip_params), None

        x, states = jax.lax.scan(descend, x, stacked_parameters(in_blocks))
        x = rematerialized(pure, remat)(x, mid_block.variables["params"])
        joins = None
        if skips:
            joins = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(_cast_projection(skip) for skip in skips))
        mirrored = jax.tree.map(lambda state: state[::-1], states)
        return jax.lax.scan(ascend, x, (stacked_parameters(out_blocks), mirrored, joins))[0]

    recomputed = None if initializing or remat == "none" else rematerialized(pure, remat)

    def call(block: Block, x: Array, skip: Array | None = None, join: LongSkip | None = None) -> Array:
        if recomputed is not None:
            return recomputed(x, block.variables["params"], skip, None if join is None else _parameters(join))
        return block(x if join is None else join(x, skip), mask, condition)

    states = []
    for block in in_blocks:
        x = call(block, x)
        states.append(x)
    x = call(mid_block, x)
    for i, block in enumerate(out_blocks):
        x = call(block, x, states.pop(), skips[i]) if skips else call(block, x)
    return x


def _parameters(skip: LongSkip) -> Any:
    """Its parameters; a sum has none."""
    return skip.variables.get("params", {})


def _cast_projection(skip: LongSkip) -> Any:
    """Its parameters; those of the dense layer as this would cast them, so that a copy takes less memory."""
    cast = {"projection": lambda leaf: leaf.astype(skip.dtype)}
    return {name: jax.tree.map(cast.get(name, lambda leaf: leaf), tree) for name, tree in _parameters(skip).items()}
