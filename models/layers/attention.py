"""Scaled dot-product attention, by the implementation that is chosen, and its masks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float, Int, Key

from models.layers.attention_choice import choose_attention, device_in_context
from models.layers.dropout import drop
from models.layers.partitioning import device_platform, map_rows_and_heads

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash", "splash_interpreted")
_HIDDEN = -1e30  # finite, so that a gradient through a hidden score is 0 and not NaN
_SPLASH_BLOCKS = (512, 384, 256, 128)  # the kernel's lanes come in 128


@dataclasses.dataclass(frozen=True)
class MaskChoice:
    """One of a few masks: what a layer inside `jax.lax.scan` has, which knows its place only when it runs.

    Attributes:
      masks: the masks that there are, each [L M].
      index: which of them holds.
    """

    masks: tuple[Bool[np.ndarray, "l m"], ...]
    index: Int[Array, ""]


@struct.dataclass
class KeyLengths:
    """The mask of keys that are padded behind: of each example, all queries see the first so many.

    Attributes:
      lengths: [B].
    """

    lengths: Int[Array, "b"]

    def dense(self, keys: int) -> Bool[Array, "b 1 1 {keys}"]:
        """The same as an array, True = attend."""
        return jnp.arange(keys) < self.lengths[:, None, None, None]


Mask = Bool[Array, "..."] | Bool[np.ndarray, "..."] | MaskChoice | KeyLengths


def attend(
    q: Float[Array, "b l n k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask | None = None,
    implementation: str = "xla",
    dropout: float = 0.0,
    dropout_keys: Key[Array, "b"] | None = None,
) -> Float[Array, "b l n k"]:
    """Softmax attention, softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017, equation 1); scores and softmax in float32.

    * "auto" is "cudnn" where it can run and gains, else "xla"; see `models.layers.attention_choice`. A program has the
      name of what was chosen in its operations' names, `attention_xla` for example (see `cost.hlo.read_attention`).
    * "xla" puts the heads next to the batch before two batched matrix products: at B 32, L 80, N 2 to 4 and K 64 to 80
      forward and backward take about 0.85 of the time of `jax.nn.dot_product_attention` on a CPU.
    * "cudnn" is that function's fused kernel on NVIDIA GPUs: bfloat16 or float16, K a multiple of 8, at most 128 (256
      from Hopper on). It has no forward-mode derivative. A mask that hides nothing, that is causal, or that is
      `KeyLengths` costs it nothing; any other becomes a bias as large as the mask, and its backward pass writes the
      gradient of that, too.
    * "splash" is JAX's block-sparse kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`): scores never
      reach memory, and blocks that the mask hides entirely are not computed. The mask must be known while tracing.
    * "splash_interpreted" is the same program step by step on any device: slow, for tests.

    Which device the program is for is asked of the mesh in context (see `device_platform`).

    Args:
      q: queries.
      k: keys, of as many heads or of fewer, H, each of which answers N / H heads of queries that follow each other
        (grouped queries, Ainslie et al. 2023).
      v: values, of as many heads as the keys.
      mask: True = attend, broadcastable to [b n l m]; what a numpy array [l m] says is known while tracing. A row
        without any True gives the mean of `v` in "xla", and is undefined in the others.
      implementation: one of `IMPLEMENTATIONS`.
      dropout: of what values are weighed by, where there are keys; "xla" alone has it.
      dropout_keys: one an example; None for none.

    Raises:
      ValueError: on an unknown implementation, or on one that cannot run on this device or with these arguments.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if dropout and dropout_keys is not None:
        if implementation not in ("auto", "xla") or q.shape[2] != k.shape[2]:
            raise ValueError(f"attention {implementation!r} of these heads drops nothing; set implementation='xla'")
        with jax.named_scope("attention_xla"):
            return _attend_xla(q, k, v, mask, dropout, dropout_keys)
    if implementation == "auto":
        lengths = q.shape[1], k.shape[1]
        kind = mask_kind(mask, *lengths)
        implementation = choose_attention(device_in_context(), q.dtype, q.shape[-1], lengths, kind)
    with jax.named_scope(f"attention_{implementation}"):
        if implementation == "xla":
            return _attend_xla(q, k, v, mask) if q.shape[2] == k.shape[2] else _attend_grouped(q, k, v, mask)
        # The fused kernels' heads are split over devices, where a group might come apart.
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        if implementation == "cudnn":
            return _attend_cudnn(q, k, v, mask)
        return _attend_splash(q, k, v, mask, implementation == "splash_interpreted")


def mean_weights(
    q: Float[Array, "b l n k"], k: Float[Array, "b m n k"], mask: Mask | None = None
) -> Float[Array, "b l m"]:
    """What `attend` weighs values by, averaged over heads: each row sums to 1. Float32; `mask` as there."""
    scores = jnp.einsum("blnk,bmnk->bnlm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores += jnp.where(_array(mask, k.shape[1]), 0.0, _HIDDEN)
    return jax.nn.softmax(scores, axis=-1).mean(axis=1)


def keep_weights(module: nn.Module, q: Array, k: Array, mask: Mask | None) -> None:
    """Keeps `mean_weights` as "weights" in the collection "intermediates", if a call of the network asks for that.

    `network.apply(..., mutable=["intermediates"])` does. Any other call computes nothing of it; and one that asks has
    the outputs of any other, since they come from `attend` as ever.
    """
    if module.is_mutable_collection("intermediates") and not module.is_initializing():
        module.sow("intermediates", "weights", mean_weights(q, k, mask))


def mask_kind(mask: Mask | None, queries: int, keys: int) -> str:
    """Which of `models.layers.attention_choice.MASK_KINDS` a mask of so many queries and keys is."""
    if isinstance(mask, KeyLengths):
        return "lengths"
    if isinstance(mask, np.ndarray) and mask.shape == (queries, keys):
        if mask.all():
            return "none"
        return "causal" if queries == keys and np.array_equal(mask, np.tri(queries, dtype=bool)) else "dense"
    return "none" if mask is None else "dense"


def _attend_xla(
    q: Array, k: Array, v: Array, mask: Mask | None, dropout: float = 0.0, dropout_keys: Array | None = None
) -> Array:
    """Attention that the compiler fuses as it can."""
    keys = k.shape[1]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bnlk,bnmk->bnlm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores += jnp.where(_array(mask, keys), 0.0, _HIDDEN)
    dropped = functools.partial(drop, rate=dropout, keys=dropout_keys) if dropout_keys is not None else None
    return _weigh("bnlm,bnmk->bnlk", scores, v, dropped).transpose(0, 2, 1, 3)


def _weigh(equation: str, scores: Array, v: Array, dropped: Callable[[Array], Array] | None = None) -> Array:
    """softmax(scores) v, divided by the sum behind the product: it has K numbers a query where there are M weights.

    Forward and backward pass over the weights once less each: on one core of an EPYC (Zen 4) a training step of
    `configs/scenes/ddpm_uvit.py` takes 0.95 of the time.
    """
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    if dropped is not None:
        weights = dropped(weights)
    y = jnp.einsum(equation, weights, v, preferred_element_type=scores.dtype)
    return (y / total).astype(v.dtype)


def _attend_grouped(q: Array, k: Array, v: Array, mask: Mask | None) -> Array:
    """As `_attend_xla`, where N / H heads of queries share one of keys: no copies of these are made."""
    batch, length, heads, width = q.shape
    keys, groups = k.shape[1:3]
    q = (q * width**-0.5).reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    scores = jnp.einsum("bgrlk,bgmk->bgrlm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        seen = jnp.asarray(_array(mask, keys))
        seen = seen[(None,) * (4 - seen.ndim)]
        seen = seen[:, :, None] if seen.shape[1] == 1 else seen.reshape(len(seen), groups, -1, *seen.shape[2:])
        scores += jnp.where(seen, 0.0, _HIDDEN)
    y = _weigh("bgrlm,bgmk->bgrlk", scores, v)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def _attend_cudnn(q: Array, k: Array, v: Array, mask: Mask | None) -> Array:
    """The fused attention of cuDNN. Raises ValueError where it cannot run."""
    _require_platform("cudnn", "gpu", "an NVIDIA GPU")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention 'cudnn' computes in bfloat16 or float16, not {q.dtype}; set implementation='xla'")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise ValueError(
            f"attention 'cudnn' needs heads whose width is a multiple of 8, at most 256, not {q.shape[-1]}; "
            "set implementation='xla'"
        )
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    kind = mask_kind(mask, length, keys)
    # JAX 0.10 differentiates even lengths only. A key that is added is hidden by the mask; a query that is added has an
    # output that is cut off, and so no gradient.
    rows, columns = length % 2, keys % 2
    lengths = None
    if isinstance(mask, KeyLengths):
        lengths = jnp.maximum(mask.lengths, 1).astype(jnp.int32)  # the kernel divides by zero where there is no key
    elif kind == "none" and columns:
        lengths = jnp.full(batch, keys, jnp.int32)
    q = pad_length(q, length + rows)
    k, v = (pad_length(x, keys + columns) for x in (k, v))
    try:
        if kind == "dense":
            dense = jnp.asarray(_array(mask, keys))
            dense = dense[(None,) * (4 - dense.ndim)]
            dense = jnp.broadcast_to(dense, (*dense.shape[:2], length, keys))
            dense = jnp.pad(dense, ((0, 0), (0, 0), (0, rows), (0, 0)), mode="edge")
            dense = jnp.pad(dense, ((0, 0), (0, 0), (0, 0), (0, columns)))
            out = _cudnn(q, k, v, mask=dense)
        elif lengths is not None:
            out = map_rows_and_heads(_cudnn_with_lengths, q, k, v, lengths[:, None, None, None])
        else:
            out = map_rows_and_heads(functools.partial(_cudnn, is_causal=kind == "causal"), q, k, v)
    except (NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"attention 'cudnn' cannot run here ({reason}); set implementation='xla'") from error
    return out[:, :length]


def _cudnn_with_lengths(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """The kernel, of lengths [b 1 1 1]."""
    return _cudnn(q, k, v, key_value_seq_lengths=lengths[:, 0, 0, 0])


def _cudnn(q: Array, k: Array, v: Array, **mask: Any) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **mask)


def _attend_splash(q: Array, k: Array, v: Array, mask: Mask | None, interpret: bool) -> Array:
    """JAX's block-sparse TPU kernel, on each device's own rows and heads. Raises ValueError where it cannot run."""
    if not interpret:
        _require_platform("splash", "tpu", "a TPU (tests on other devices: 'splash_interpreted')")
    if mask is None:
        mask = np.ones((q.shape[1], k.shape[1]), bool)

    def attend_under(mask: np.ndarray, q: Array, k: Array, v: Array) -> Array:
        return map_rows_and_heads(functools.partial(_splash, mask=mask, interpret=interpret), q, k, v)

    if isinstance(mask, MaskChoice):
        # The kernel's list of blocks differs in length between masks, so each has a kernel of its own.
        return jax.lax.switch(mask.index, [functools.partial(attend_under, m) for m in mask.masks], q, k, v)
    if not isinstance(mask, np.ndarray) or mask.shape != (q.shape[1], k.shape[1]):
        given = f"{type(mask).__name__} {list(getattr(mask, 'shape', []))}".removesuffix(" []")
        raise ValueError(
            f"attention 'splash' needs a numpy mask [{q.shape[1]}, {k.shape[1]}], the same for all examples and heads, "
            f"not {given}; set implementation='xla'"
        )
    return attend_under(mask, q, k, v)


def attend_from_one(
    q: Float[Array, "b n k"],
    x: Float[Array, "b m d"],
    key_kernel: Float[Array, "d n k"],
    value_kernel: Float[Array, "d n k"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n k"]:
    """What `attend` makes of one query, keys x W_k and values x W_v, without making these; scores in float32.

    Vaswani et al. 2017, equation 1, with its products in another order: q (x W_k)^T = (q W_k^T) x^T and w (x W_v) =
    (w x) W_v, so that the kernels multiply one position instead of M. A bias of the keys would add the same to all
    scores of a row and change nothing; one of the values is the caller's to add to the result, as weights sum to 1.

    Args:
      q: one query an example.
      x: what keys and values are projected from.
      key_kernel: W_k.
      value_kernel: W_v.
      mask: True = attend.
    """
    q = jnp.einsum("bnk,dnk->bnd", q * q.shape[-1] ** -0.5, key_kernel)
    scores = jnp.einsum("bnd,bmd->bnm", q, x, preferred_element_type=jnp.float32)
    if mask is not None:
        scores += jnp.where(mask[:, None], 0.0, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    return jnp.einsum("bnd,dnk->bnk", jnp.einsum("bnm,bmd->bnd", weights, x), value_kernel)


def _splash(q: Array, k: Array, v: Array, *, mask: np.ndarray, interpret: bool) -> Array:
    """The kernel on arrays that one device holds, lengths padded to whole blocks."""
    length, memory = mask.shape
    heads = q.shape[2]
    block_q, block_kv = _splash_block(length), _splash_block(memory)
    padded = np.pad(mask, ((0, -length % block_q), (0, -memory % block_kv)))
    padded[length:, 0] = True  # a row that sees nothing divides by zero; these rows are cut off again
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.NumpyMask(padded)] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = q * q.shape[-1] ** -0.5  # which the kernel leaves to its caller
    q, k, v = (
        pad_length(x, size).transpose(0, 2, 1, 3)
        for x, size in zip((q, k, v), (padded.shape[0], padded.shape[1], padded.shape[1]), strict=True)
    )
    out: Array = jax.vmap(kernel)(q, k, v)
    return out.transpose(0, 2, 1, 3)[:, :length]


def _splash_block(length: int) -> int:
    """The side of the kernel's blocks: of those that pad the length least, the largest."""
    return min(_SPLASH_BLOCKS, key=lambda block: (length + -length % block, -block))


def pad_length(x: Array, length: int) -> Array:
    """Appends zeros to x [b l n k] up to a length."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _array(mask: Mask, keys: int) -> Array | np.ndarray:
    """The mask itself, of a choice the chosen one."""
    if isinstance(mask, KeyLengths):
        return mask.dense(keys)
    if isinstance(mask, MaskChoice):
        return jnp.asarray(np.stack(mask.masks))[mask.index]
    return mask


def _require_platform(implementation: str, platform: str, device: str) -> None:
    """Raises ValueError unless the program is for this platform."""
    found = device_platform()
    if found != platform:
        raise ValueError(
            f"attention {implementation!r} needs {device}, and this program is for {found}; set implementation='xla'"
        )
