"""A CLIP's image tower as the beginning of a `models.tiled_image_encoder.TiledImageEncoder`.

Dubey et al. 2024, "The Llama 3 Herd of Models", section 7.2: the encoder was first trained as a CLIP's tower, on
smaller pictures, and got its last layers and the positions of tiles later.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from models.clip import Clip, resize_positions


def encoder_from_clip(params: Mapping[str, Any], clip: Clip, ours: Any) -> dict[str, Any]:
    """Those parameters of the encoder of a `PictureReader` that a CLIP's tower has, positions interpolated.

    Its first layers, their norms on both sides, patches and positions. It is a start, and not the same function: biases
    of attention are left behind, which the encoder has none of, as are the tower's last projection and its activation,
    where that is not the exact GELU.

    Args:
      params: of the CLIP.
      clip: the network that they are of.
      ours: the `PictureReader`.

    Raises:
      ValueError: if its tower is no ViT of the encoder's widths, or has fewer layers.
    """
    wanted = {
        "image_tower": "vit",
        "image_width": ours.image_width,
        "image_heads": ours.image_heads,
        "patch_size": ours.patch_size,
        "image_mean": tuple(ours.image_mean),
        "image_std": tuple(ours.image_std),
    }
    problems = [f"{name} {getattr(clip, name)!r}" for name, value in wanted.items() if getattr(clip, name) != value]
    hidden = (round(clip.image_width * clip.image_mlp_ratio), round(ours.image_width * ours.image_mlp_ratio))
    problems += [f"image_mlp_ratio {clip.image_mlp_ratio}"] if hidden[0] != hidden[1] else []
    layers = clip.image_layers if isinstance(clip.image_layers, int) else 0
    problems += [f"{layers} layers"] if layers < ours.image_layers else []
    if problems:
        raise ValueError(f"its tower has another {', '.join(problems)} than the encoder")
    leaves = flatten_dict(dict(params["image"]))
    kept = {}
    for path, leaf in leaves.items():
        place, *rest = path
        number = place.removeprefix("blocks_")
        if place == "projection" or (place != number and int(number) >= ours.image_layers):
            continue
        if "attention" in rest and rest[-1] == "bias":
            continue
        kept[("last_norm", *rest) if place == "final_norm" else path] = leaf
    sides = clip.image_size // ours.patch_size, ours.tile_size // ours.patch_size
    path = ("position", "embedding")
    kept[path] = resize_positions(jnp.asarray(kept[path]), *sides)
    return unflatten_dict(kept)
