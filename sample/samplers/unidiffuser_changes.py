"""A picture that a UniDiffuser is to change, as a strength or a mask beside it says, and not to describe.

What a solver makes of such a picture, `sample.samplers.given_picture` says: here is which requests hold one, in which
modes that may be, and what of it is diffused.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from cli.errors import UserError
from sample.samplers.dvae import from_uint8
from sample.samplers.given_picture import GivenPicture, known_places
from sample.samplers.unidiffuser_settings import scaled

Tree = Any

CHANGING = ("text_to_image", "image")  # modes in which a picture may be changed: as a caption says, and without one


def changes(told: Collection[str], overrides: Mapping[str, Any]) -> bool:
    """Whether a request changes the picture that it holds.

    Args:
      told: names of the rows that it holds.
      overrides: of a sampler's settings, and strength.
    """
    return "image" in told and ("mask" in told or "strength" in overrides)


def split_request(told: Collection[str], overrides: Mapping[str, Any], usual: str) -> tuple[list[str], dict[str, Any]]:
    """The rows that a mode is to read, and the settings: with the mode that changes a picture where one is changed.

    Args:
      told: see `changes`.
      overrides: see there.
      usual: the mode where they say none; "" for what the rows ask for.

    Raises:
      UserError: if the mode that is chosen changes no picture.
    """
    settings = {name: value for name, value in overrides.items() if name != "strength"}
    given = [name for name in ("text", "image") if name in told]
    if changes(told, overrides):
        given.remove("image")
        mode = settings.get("mode", usual) or CHANGING[not given]
        if mode not in CHANGING:
            raise UserError(f"mode {mode} changes no picture; leave out strength and mask, or the mode")
        settings["mode"] = mode
    return given, settings


def picture_to_change(
    sampler: Any, frozen: Tree, factors: Mapping[str, Array], request: Mapping[str, Array], strength: float
) -> GivenPicture:
    """What a solver has of a picture: mean latents, known where the mask says so, and its embedding.

    Args:
      sampler: a `sample.samplers.unidiffuser.UniDiffuserSampler`.
      frozen: its frozen parts.
      factors: of latents.
      request: holds the picture as `image`, and perhaps a `mask`.
      strength: share of the steps that are made.
    """
    z = sampler.first_stage.mean(frozen, from_uint8(request["image"]))
    data = {"image": z, **scaled({"clip": sampler.embed(frozen, request["image"])}, factors)}
    known = None
    if "mask" in request:  # of another picture there is another embedding
        known = {"image": known_places(request["mask"], *z.shape[1:3]), "clip": jnp.zeros((len(z), 1), bool)}
    return GivenPicture(data, known, strength)
