"""A small network for diffusion of points: dense layers that are told the time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.conditioning import Conditioning
from models.layers.dense import Dense
from models.layers.embeddings import sinusoidal_embedding


class PointDenoiser(nn.Module):
    """A residual multilayer perceptron under the contract of diffusion backbones.

    Attributes:
      dimensions: of a point.
      width: of the hidden layers.
      depth: residual layers.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    dimensions: int = 2
    width: int = 128
    depth: int = 3
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning]:
        """Shapes of the arguments of `__call__`."""
        points = jax.ShapeDtypeStruct((batch_size, self.dimensions), jnp.float32)
        return points, jax.ShapeDtypeStruct((batch_size,), jnp.float32), Conditioning()

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "b d"], t: Float[Array, "b"], conditioning: Conditioning, train: bool = False
    ) -> Float[Array, "b d"]:
        """Predicts what it was trained to, from points and their times.

        Raises:
          ValueError: if there is a condition, which this network does not take.
        """
        del train
        if jax.tree.leaves(conditioning):
            raise ValueError("the network point_denoiser takes no condition")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        time = Dense(self.width, name="time", **types)(sinusoidal_embedding(t, self.width))
        x = Dense(self.width, name="into", **types)(x_t)
        for layer in range(self.depth):
            y = Dense(self.width, name=f"up_{layer}", **types)(nn.silu(x + time))
            x = x + Dense(self.width, name=f"down_{layer}", **types)(nn.silu(y))
        out = Dense(self.dimensions, kernel_init=nn.initializers.zeros_init(), name="out", **types)
        return out(nn.silu(x)).astype(jnp.float32)
