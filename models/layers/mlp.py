"""The feed-forward block of a transformer, and activations by name."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.layers.dense import Dense, DenseParts

Initializer = nn.initializers.Initializer


def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The exact GELU, x P(X <= x) of a standard normal X (Hendrycks & Gimpel 2016), by erf; in float32 or wider.

    `jax.nn.gelu` computes it by erfc, which keeps the digits of results near 0 for large -x, and of which XLA's CPU
    compiler makes three passes over memory with an exponential; erf is a quotient of polynomials in one.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, "Primer"
    "silu": jax.nn.silu,
}


def activate(x: Float[Array, "*n"], activation: str) -> Float[Array, "*n"]:
    """One of `ACTIVATIONS`, of which nothing but x is kept for the gradient: computing it again is cheaper than memory.

    With `gelu` above a training step of `configs/scenes/ddpm_uvit.py` takes 0.91 of its time on one core of an EPYC
    (Zen 4), and 154 MiB in place of 225.
    """
    return jax.checkpoint(ACTIVATIONS[activation])(x)


class MLP(nn.Module):
    """Two dense layers with an activation between them.

    Attributes:
      hidden: width between the layers.
      activation: a key of `ACTIVATIONS`; "gelu" is the exact one, "quick_gelu" is CLIP's.
      kernel_init: initializer of the first layer.
      out_init: initializer of the second layer.
      bias_init: initializer of the first layer's bias.
      out_bias_init: initializer of the second layer's bias.
      dtype: of the computation.
      param_dtype: of the parameters.

    Raises:
      ValueError: when called, if there is no such activation.
    """

    hidden: int
    activation: str = "gelu"
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_init: Initializer = nn.initializers.normal(0.02)
    bias_init: Initializer = nn.initializers.zeros_init()
    out_bias_init: Initializer = nn.initializers.zeros_init()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Applies the block to each position on its own."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = Dense(self.hidden, kernel_init=self.kernel_init, bias_init=self.bias_init, name="up", **types)(x)
        y = activate(y, self.activation)
        out = {"kernel_init": self.out_init, "bias_init": self.out_bias_init}
        return Dense(x.shape[-1], name="down", **out, **types)(y)


class GatedMLP(nn.Module):
    """A gated feed-forward block (Shazeer 2020, "GLU Variants Improve Transformer"): down(up(x) * activation(gate(x))).

    Attributes:
      hidden: width between the layers.
      activation: of the gate, a key of `ACTIVATIONS`; "gelu" makes it GEGLU.
      kernel_init: initializer of the first layers, which are one: index 0 of its output is up, 1 the gate.
      out_init: initializer of the last layer.
      use_bias: whether the layers have one.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    hidden: int
    activation: str = "gelu"
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_init: Initializer = nn.initializers.normal(0.02)
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Applies the block to each position on its own."""
        types = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        up, gate = DenseParts((2, self.hidden), kernel_init=self.kernel_init, name="up_gate", **types)(x)
        y = up * activate(gate, self.activation)
        return Dense(x.shape[-1], kernel_init=self.out_init, name="down", **types)(y)
