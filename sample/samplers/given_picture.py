"""A picture that is given to be changed, by a diffusion of pixels or of latents.

It is noised and denoised again by the last steps of the sampler (SDEdit, Meng et al. 2022, section 3); or, with a mask,
drawn anew where that says so. There the network's estimate of the data is replaced by the picture where it is known:
any solver then takes known data along the noise that they began with, and stochastic ones draw them from their own
posterior, so that at each step the network sees what it would see of such a picture.

A latent is known where all of its pixels are. As decoding changes known pixels too, those of the picture are laid over
what comes out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from cli.errors import UserError
from diffusion.plan import Plan, State
from sample.samplers.dvae import from_uint8

STRENGTH = 0.8  # of a picture that is given without a mask
STAYS = "strength 0 runs no step"  # why nothing that says how a picture is drawn is read then


@dataclasses.dataclass(frozen=True)
class GivenPicture:
    """What a solver has of it.

    Attributes:
      data: what is diffused of it, [b ...] or a pytree of such.
      known: where that stays, a tree as `data` whose shapes broadcast to its; None changes all of it.
      strength: share of the sampler's steps that are made, the last ones.
    """

    data: State
    known: State | None
    strength: float

    def first_state(self, plan: Plan, first: State) -> State:
        """What the solver starts from, with noise of unit variance."""

        def noised(data: Array, noise: Array) -> Array:
            return float(plan.alpha[0]) * data + plan.first_sigma * noise

        x = jax.tree.map(noised, self.data, first)
        if self.strength < 1:
            return x
        # At full strength what is not known is as fresh as without a picture.
        fresh = jax.tree.map(lambda noise: plan.first_scale * noise, first)
        return fresh if self.known is None else jax.tree.map(jnp.where, self.known, x, fresh)

    def keep(self, drawn: State) -> State:
        """What was drawn or estimated, with the picture where it is known."""
        return drawn if self.known is None else jax.tree.map(jnp.where, self.known, self.data, drawn)


def chosen_strength(image: Any, mask: Any, overrides: Mapping[str, Any]) -> float:
    """How much of a picture is changed, 1 where none is given.

    Raises:
      UserError: unless what is given goes together.
    """
    if image is None:
        for name in ("strength", "mask"):
            if name in overrides or (name == "mask" and mask is not None):
                raise UserError(f"{name} is of a picture to change; give one, --image=FILE")
        return 1.0
    if mask is not None and mask.shape != image.shape[:3]:
        raise UserError(f"masks are {list(mask.shape)}, and their pictures {list(image.shape[:3])}")
    strength = float(overrides.get("strength", STRENGTH if mask is None else 1.0))
    if not 0 <= strength <= 1:
        raise UserError(f"strength={strength} is impossible; use 0, the picture itself, to 1, a fresh one")
    if mask is not None and strength == 0:
        raise UserError("a mask has no effect with strength 0, which changes nothing; leave out one of them")
    if mask is not None and not mask.any():
        raise UserError("the mask is black all over what is seen of its picture; make it white where to draw")
    return strength


def known_places(mask: Bool[Array, "b H W"], height: int, width: int) -> Bool[Array, "b h w 1"]:
    """Where what is diffused, of so many rows and columns, stays: where none of its pixels is to be drawn anew."""
    return jnp.all(rearrange(~mask, "b (h p) (w q) -> b h w (p q)", h=height, w=width), axis=-1)[..., None]


def lay_over(images: Float[Array, "b H W c"], request: Mapping[str, Array]) -> Float[Array, "b H W c"]:
    """Images in [-1, 1] with the pixels of the request's `image` where its `mask`, if it has one, is not."""
    if "mask" not in request:
        return images
    return jnp.where(request["mask"][..., None], images, from_uint8(request["image"]))
