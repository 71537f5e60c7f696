"""Dense layers; on a CPU as products of matrices, whose gradients XLA computes faster."""

import contextlib
import contextvars
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.layers.partitioning import on_one_cpu

SWITCH = "TESSERA_DENSE"  # `default` leaves dense layers and convolutions to XLA as Flax writes them

_plain = contextvars.ContextVar("plain", default=False)

DimensionNumbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def dot_general(
    x: Float[Array, "..."], kernel: Float[Array, "..."], dimension_numbers: DimensionNumbers, **options: Any
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` as Flax's dense layers call it: trailing axes of x with leading ones of the kernel.

    On a single CPU device both are made matrices first. With more axes XLA writes transposed copies of kernels and of
    gradients, and a kernel's gradient, transposed, slows the optimizer too; docs/performance.md has what is gained.
    `TESSERA_DENSE=default` leaves that out, in programs that are traced afterwards.

    Args:
      x: inputs.
      kernel: weights.
      dimension_numbers: as in the plain function.
      **options: the plain function's others.

    Returns:
      as the plain function.
    """
    (x_axes, kernel_axes), batch_axes = dimension_numbers
    count = len(x_axes)
    trailing = tuple(x_axes) == tuple(range(x.ndim - count, x.ndim)) and tuple(kernel_axes) == tuple(range(count))
    if not makes_matrices() or not trailing or any(batch_axes):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    inputs = math.prod(kernel.shape[:count])
    rows, matrix = x.reshape(-1, inputs), kernel.reshape(inputs, -1)
    if len(rows) >= inputs > matrix.shape[1]:
        # The gradient is then made the other way round, at 99 GFLOP/s on a core in place of 53 (2464 rows, 512 to 128).
        # Without the barrier the compiler turns it back.
        transposed = jax.lax.optimization_barrier(matrix.T)
        y = jax.lax.dot_general(rows, transposed, (((1,), (1,)), ((), ())), **options)
    else:
        y = jax.lax.dot_general(rows, matrix, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[: x.ndim - count], *kernel.shape[count:])


def makes_matrices() -> bool:
    """Whether products of the program that is traced are made of matrices."""
    return on_one_cpu() and os.environ.get(SWITCH) != "default" and not _plain.get()


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Within it a program is traced as for any other device: a network has the same FLOPs everywhere."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


# Flax's layers with the product above.
Dense = functools.partial(nn.Dense, dot_general=dot_general)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=dot_general)


class DenseParts(nn.Module):
    """Dense layers of one input whose parameters are stacked: `DenseGeneral` of (layers, ...) features, unstacked.

    On a single CPU device each layer is a product of its own, unless `TESSERA_DENSE` is `default` or an input has fewer
    rows than columns, as in decoding, where the layers' kernels would be copied out of their stack for nothing. Of one
    wide product the gradients would first be written side by side, by a loop that takes a number at a time.
    docs/performance.md has what is gained.

    Attributes:
      features: how many layers, and the shape of an output of each.
      kernel_init: initializer of the stacked kernels, as of one matrix of all outputs.
      bias_init: initializer of the stacked biases.
      use_bias: whether there are any.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    features: tuple[int, ...]
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> tuple[Float[Array, "..."], ...]:
        """Applies every layer to x; an output each."""
        inputs, outputs = x.shape[-1], math.prod(self.features)
        shape = (inputs, *self.features)
        kernel = self.param(
            "kernel", lambda key: self.kernel_init(key, (inputs, outputs), self.param_dtype).reshape(shape)
        )
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", lambda key: self.bias_init(key, (outputs,), self.param_dtype).reshape(self.features)
            )
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        numbers = (((x.ndim - 1,), (0,)), ((), ()))
        if not makes_matrices() or x.size < inputs**2:
            y = dot_general(x, kernel, numbers)
            return jnp.unstack(y if bias is None else y + bias, axis=x.ndim - 1)
        parts = (dot_general(x, part, numbers) for part in jnp.unstack(kernel, axis=1))
        return tuple(parts) if bias is None else tuple(map(jnp.add, parts, bias))
