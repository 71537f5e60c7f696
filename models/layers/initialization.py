"""How PyTorch starts its layers: published networks keep this wherever their code says nothing else."""

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array

# Kernels, of dense layers and convolutions: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> nn.initializers.Initializer:
    """Biases: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), of the inputs of the layer's kernel."""
    bound = fan_in**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = float) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
