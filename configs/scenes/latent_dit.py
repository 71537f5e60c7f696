"""Diffusion in the latents of a first stage on `scenes`, with a small DiT that reads captions by cross-attention.

Paper: Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", with captions as in Chen et al. 2024,
"PixArt-alpha".

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/autoencoder.py --workdir=runs/autoencoder
    python -m train --config=configs/scenes/latent_dit.py --workdir=runs/latent_dit

First stage, captions, process and optimizer are those of `configs/scenes/latent_unet.py`; an update takes 0.83 times
the multiplications of that UNet's.

Hardware and time: one CPU core, 21 minutes, after which all captions are right, held-out ones too (docs/results.md).

Arguments: `single32` (default), `pair64` (see there), `debug` (seconds; a random first stage).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.mesh_rules import DIT, FIRST_STAGE
from configs.scenes.latent_unet import ARGUMENTS, get_latent_training, shrink_latent


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ARGUMENTS)
    config = get_latent_training(argument)
    config.models.denoiser.name = "dit"
    config.models.denoiser.patch_size = 1
    config.models.denoiser.width = 384 if argument == "pair64" else 128
    config.models.denoiser.depth = 8 if argument == "pair64" else 5
    config.models.denoiser.heads = 6 if argument == "pair64" else 4
    config.mesh.rules = FIRST_STAGE + DIT
    if argument == "debug":
        shrink_latent(config)
        config.models.denoiser.patch_size = 2
        config.models.denoiser.width = 32
        config.models.denoiser.depth = 1
    config.lock()
    return config
