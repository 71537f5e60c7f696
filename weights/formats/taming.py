"""VQGANs of taming-transformers (github.com/CompVis/taming-transformers) as DALL-Es of others have them beside theirs.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis". Their tensors are those that latent
diffusion's authors kept, which `weights.formats.compvis` reads; here is what says their sizes in documents, and the
names of a JAX port (github.com/patil-suraj/vqgan-jax), whose modules and kernels are Flax's.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from cli.errors import UserError
from weights.files.fields import IDLE, Field, fixed, several, whole
from weights.files.tensors import Tensors

# Arguments of the published encoder and decoder, whose defaults are those of 256 x 256 pictures and 16 x 16 tokens.
TRUNK: dict[str, Field] = {
    "double_z": fixed(False),
    "z_channels": whole(256),
    "resolution": whole(256),
    "in_channels": whole(3),
    "out_ch": whole(3),
    "ch": whole(128),
    "ch_mult": several(whole(high=1024), (1, 1, 2, 2, 4)),
    "num_res_blocks": whole(2, high=64),
    "attn_resolutions": several(whole(), (16,), single=True),
    "resamp_with_conv": fixed(True),
    **dict.fromkeys(("dropout", "pdrop"), IDLE),
}


def vqgan_fields(what: str, trunk: Mapping[str, Any], codes: int, width: int) -> dict[str, Any]:
    """Makes {"name": "autoencoder_vq", fields of `models.autoencoder.VQAutoencoder`} of a document.

    Args:
      what: names the network in errors.
      trunk: values of `TRUNK`.
      codes: of the codebook.
      width: of a code.

    Raises:
      UserError: if ours cannot compute that network.
    """
    problems = []
    if trunk["z_channels"] != width:
        problems.append(f"z_channels is {trunk['z_channels']} and embed_dim {width}, ours are one")
    if trunk["in_channels"] != trunk["out_ch"]:
        problems.append(f"in_channels is {trunk['in_channels']} and out_ch {trunk['out_ch']}, ours are one")
    attending = trunk["attn_resolutions"]
    attending = (attending,) if isinstance(attending, int) else tuple(attending)
    levels = len(trunk["ch_mult"])
    if trunk["resolution"] % 2 ** (levels - 1):
        problems.append(f"resolution is {trunk['resolution']}, which {levels} entries of ch_mult do not divide")
    if problems:
        raise UserError(f"{what} cannot be converted: {'; '.join(problems)}")
    return {
        "name": "autoencoder_vq",
        "image_size": trunk["resolution"],
        "channels": trunk["in_channels"],
        "width": trunk["ch"],
        "multipliers": tuple(trunk["ch_mult"]),
        "attention_levels": tuple(level for level in range(levels) if trunk["resolution"] // 2**level in attending),
        "blocks": trunk["num_res_blocks"],
        "latent_channels": width,
        "latent_scale": 1.0,
        "vocab_size": codes,
    }


def from_flax(tree: Mapping[str, Any]) -> Tensors:
    """Parameters of the JAX port by the names of the original, kernels [out, in, height, width].

    Raises:
      UserError: if a leaf is no array, or a kernel is not of a convolution.
    """
    tensors: Tensors = {}
    for path, value in flatten_dict(dict(tree)).items():
        *modules, leaf = (str(part) for part in path)
        if not isinstance(value, np.ndarray):
            raise UserError(
                f"these are not the weights of a VQGAN of vqgan-jax: {'/'.join(map(str, path))} is no array"
            )
        # Lists of modules: down_0/block_1 is down.0.block.1; in the middle the number is part of the name.
        names = [
            name if modules[place - 1 : place] == ["mid"] else re.sub(r"^(down|up|block|attn)_(\d+)$", r"\1.\2", name)
            for place, name in enumerate(modules)
        ]
        if leaf == "kernel":
            if value.ndim != 4:
                raise UserError(
                    f"these are not the weights of a VQGAN of vqgan-jax: {'/'.join(map(str, path))} is {value.shape}"
                )
            value = value.transpose(3, 2, 0, 1)
        elif leaf not in ("scale", "embedding"):
            names.append(leaf)
            tensors[".".join(names)] = value
            continue
        tensors[".".join((*names, "weight"))] = value
    return tensors
