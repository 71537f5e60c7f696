"""The networks of Tessera: Flax Linen modules by name.

`create_model` is how every other package gets a network; nothing here knows a loss, a dataset, a config or a file.
"""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax.numpy as jnp

from models.autoencoder import KLAutoencoder, VQAutoencoder
from models.captioner import Captioner
from models.clip import Clip
from models.clip_text import ClipText
from models.dalle import Dalle
from models.discriminator import PatchDiscriminator
from models.dit import DiT
from models.dvae import DiscreteVAE, VectorQuantizedVAE
from models.gpt2 import GPT2
from models.gumbel_autoencoder import GumbelAutoencoder
from models.inception import Inception
from models.llama import Llama
from models.lpips import LPIPS
from models.point_denoiser import PointDenoiser
from models.strided_dvae import StridedDiscreteVAE
from models.text_encoder import TextEncoder
from models.unet import UNet
from models.unidiffuser import UniDiffuser
from models.uvit import UViT
from models.vision_adapter import VisionAdapter
from models.vision_prefix import VisionPrefix

MODELS: dict[str, type[nn.Module]] = {
    "autoencoder_gumbel": GumbelAutoencoder,
    "autoencoder_kl": KLAutoencoder,
    "autoencoder_vq": VQAutoencoder,
    "captioner": Captioner,
    "clip": Clip,
    "clip_text": ClipText,
    "dalle": Dalle,
    "discriminator": PatchDiscriminator,
    "dit": DiT,
    "dvae": DiscreteVAE,
    "dvae_strided": StridedDiscreteVAE,
    "gpt2": GPT2,
    "inception": Inception,
    "llama": Llama,
    "lpips": LPIPS,
    "point_denoiser": PointDenoiser,
    "text_encoder": TextEncoder,
    "uvit": UViT,
    "unet": UNet,
    "unidiffuser": UniDiffuser,
    "vision_adapter": VisionAdapter,
    "vision_prefix": VisionPrefix,
    "vqvae": VectorQuantizedVAE,
}


def create_model(name: str, **kwargs: Any) -> Any:
    """Builds the network called `name`.

    Args:
      name: a key of `MODELS`.
      **kwargs: fields of the module. Lists become tuples, mappings become FrozenDicts and the fields `dtype` and
        `param_dtype` may be strings, so values can come straight from a config.

    Returns:
      The Linen module, without parameters.

    Raises:
      KeyError: if there is no such network; lists the choices.
      TypeError: if a keyword is not a field of that network; lists the fields.
    """
    if name not in MODELS:
        raise KeyError(f"no model is called {name!r}; choose one of {', '.join(sorted(MODELS))}")
    model = MODELS[name]
    fields = set(model.__dataclass_fields__) - {"parent", "name"}
    unknown = sorted(set(kwargs) - fields)
    if unknown:
        raise TypeError(f"model {name!r} has no field {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    return model(**{key: _static(key, value) for key, value in kwargs.items()})


def _static(key: str, value: Any) -> Any:
    """Makes a config's value hashable, and a dtype of a dtype's name."""
    if key in ("dtype", "param_dtype"):
        return jnp.dtype(value)
    if isinstance(value, list | tuple):
        return tuple(_static("", item) for item in value)
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return flax.core.freeze({k: _static(k, v) for k, v in value.items()})
    return value
