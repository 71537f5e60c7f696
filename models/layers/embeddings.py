"""Embeddings of numbers: the time of a diffusion process, the places of a grid."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def sinusoidal_embedding(
    t: Float[Array, "b"], width: int, *, sine_first: bool = False, last_period: bool = False, max_period: float = 10000
) -> Float[Array, "b {width}"]:
    """Sines and cosines of t at frequencies that fall from 1 to 1 / max_period (Vaswani et al. 2017, section 3.5).

    Published networks differ in two details, which cannot be seen in their parameters.

    Args:
      t: times, as the network was fed them; in the published ones 0 to 999 or 1 to 1000.
      width: D; an odd one ends in a zero.
      sine_first: sines before cosines, as in DDPM; latent diffusion, ADM and U-ViT have cosines first.
      last_period: the last frequency is 1 / max_period, as in DDPM; else the one that would follow it is.
      max_period: of the slowest wave, over 2 pi.

    Returns:
      float32.
    """
    half = width // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / (half - (1 if last_period else 0))
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(max_period) * exponent)
    waves = (jnp.sin(angles), jnp.cos(angles)) if sine_first else (jnp.cos(angles), jnp.sin(angles))
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, width % 2)))


def grid_embedding(
    height: int, width: int, features: int, *, column_first: bool = False, sine_first: bool = False
) -> Float[Array, "l {features}"]:
    """Fixed positions of a grid in raster order: sines and cosines of the row, then of the column, of amplitude 1.

    They are as large as a normalized state; learned positions that start at 0.02 are small beside it.

    Args:
      height: of the grid.
      width: of the grid.
      features: D, a multiple of 4.
      column_first: the column's waves before the row's, as in DiT.
      sine_first: of each, sines before cosines, as there.

    Returns:
      float32 [height * width, features].

    Raises:
      ValueError: if `features` is no multiple of 4.
    """
    if features % 4:
        raise ValueError(f"positions on a grid take a width that is a multiple of 4, not {features}")
    places = jnp.divmod(jnp.arange(height * width, dtype=jnp.float32), width)
    places = places[::-1] if column_first else places
    return jnp.concatenate([sinusoidal_embedding(x, features // 2, sine_first=sine_first) for x in places], axis=-1)
