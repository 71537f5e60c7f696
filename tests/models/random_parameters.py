"""Random values for every parameter of a network, also of those that start at 0."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np


def random_parameters(model, seed: int = 0):
    """The parameters of a network: each matters, and features keep their scale. Compiles nothing."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = np.random.default_rng((seed, zlib.crc32(name.encode()))).normal(size=leaf.shape)
        if name.endswith("kernel"):
            joint = any(word in name for word in ("query", "key", "gate", "modulation"))  # [in, several, ...]
            noise /= np.sqrt(leaf.shape[0] if joint else np.prod(leaf.shape[:-1]))
        elif not name.endswith("embedding"):
            noise = 0.1 * noise + name.endswith("scale")
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
