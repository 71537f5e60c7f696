"""Normalization of a vector's entries, free or scaled and shifted by a condition.

Variances are those of the differences from the mean, in float32. The mean of squares less the square of the mean,
which Flax takes by default, cancels where a mean is large beside the spread: at 750 deviations a tenth of the output is
wrong, at 25,000 all of it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.layers.dense import Dense

Initializer = nn.initializers.Initializer


def layer_norm(**fields: Any) -> nn.LayerNorm:
    """A LayerNorm (Ba et al. 2016) of epsilon 1e-5, unless `fields` have another."""
    return nn.LayerNorm(**{"epsilon": 1e-5, "use_fast_variance": False, **fields})


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2 + epsilon), times a scale (Zhang and Sennrich 2019); the quotient is float32, then cast.

    Attributes:
      epsilon: added to the mean of squares.
      dtype: of the result.
      param_dtype: of the scale.
    """

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalizes the last axis."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return y.astype(self.dtype) * scale.astype(self.dtype)


class AdaptiveLayerNorm(nn.Module):
    """y_s LayerNorm(x) + y_b, where a dense layer makes [y_s - 1, y_b] of a condition (Bao et al. 2023, section 3.1).

    The dense layer's bias starts at 0, so that a small condition leaves a plain LayerNorm. Statistics are float32.

    Attributes:
      epsilon: added to the variance.
      kernel_init: of the dense layer.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    epsilon: float = 1e-5
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], condition: Float[Array, "b c"]) -> Float[Array, "b l d"]:
        """Normalizes each position; all positions of an example share their condition."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = Dense(2 * x.shape[-1], kernel_init=self.kernel_init, name="projection", **types)
        scale, shift = jnp.split(project(condition)[:, None], 2, axis=-1)
        norm = layer_norm(epsilon=self.epsilon, use_scale=False, use_bias=False, dtype=self.dtype, name="norm")
        return norm(x) * (1 + scale) + shift
