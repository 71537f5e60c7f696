"""Which pixels of a picture read which token of its caption, while a diffusion draws it.

The attention of a denoiser from its pixels to the caption's tokens (Rombach et al. 2022, section 3.3), as Hertz et al.
2022, "Prompt-to-Prompt Image Editing with Cross Attention Control", section 3, show it. The average is of all heads,
all layers that read the caption and all steps of the solver, each counting the same; of guidance, the half that is told
the caption. Maps of coarser layers are enlarged to the size of what is diffused, linearly.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.plan import Plan
from diffusion.process import Process
from models.conditioning import Conditioning


def has_caption_attention(model: Any) -> bool:
    """Whether a denoiser shows what it reads of a caption."""
    return hasattr(model, "caption_attention")


def caption_maps(
    model: Any, process: Process, params: Any, told: Conditioning, plan: Plan, states: Float[Array, "s b h w c"]
) -> Float[Array, "b h w l"]:
    """The average weights of each pixel over the tokens of its caption; they sum to 1.

    The network is asked again at every step: a solver's own program is the same whether this is asked for or not.

    Args:
      model: the denoiser.
      process: what it was trained on.
      params: of the denoiser.
      told: tokens of each picture.
      plan: of the solver.
      states: what it showed the network at each of its steps.
    """
    # Layers that are scanned or recomputed are pure functions of their parameters, which keep nothing.
    assert told.tokens is not None  # or nobody asks for them
    plain = {field: value for field, value in (("scan", False), ("remat", "none")) if hasattr(model, field)}
    model = model.clone(**plain)
    height, width = states.shape[2:4]

    def at_step(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        x_t, t = inputs
        maps = []

        def network(x: Array, time: Array) -> Array:
            output, kept = model.apply({"params": params}, x, time, told, mutable=["intermediates"])
            maps.extend(model.caption_attention(kept["intermediates"], height, width))
            return output

        process.denoiser(network)(x_t, t)
        sizes = [jax.image.resize(one, (len(one), height, width, one.shape[-1]), "linear") for one in maps]
        return total + sum(sizes) / len(sizes), None

    zeros = jnp.zeros((*states.shape[1:4], told.tokens.shape[1]))
    total, _ = jax.lax.scan(at_step, zeros, (states, jnp.asarray(plan.t, jnp.float32)))
    return total / len(states)
