"""Diffusion in the latents of a first stage on `scenes`, with a small U-ViT that reads captions.

Paper: Bao et al. 2023, "All are Worth Words: A ViT Backbone for Diffusion Models"; Rombach et al. 2022 for the latents.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/autoencoder.py --workdir=runs/autoencoder
    python -m train --config=configs/scenes/latent_uvit.py --workdir=runs/latent_uvit

First stage, captions, process and optimizer are those of `configs/scenes/latent_unet.py`; an update takes 0.77 times
the multiplications of that UNet's.

Hardware and time: one CPU core, 18 minutes, after which 98 % of the captions are right, held-out ones too
(docs/results.md).

Arguments: `single32` (default), `pair64` (see there), `debug` (seconds; a random first stage).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.mesh_rules import FIRST_STAGE, UVIT
from configs.scenes.latent_unet import ARGUMENTS, get_latent_training, shrink_latent


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ARGUMENTS)
    config = get_latent_training(argument)
    config.models.denoiser.name = "uvit"
    config.models.denoiser.patch_size = 1
    config.models.denoiser.width = 384 if argument == "pair64" else 128
    config.models.denoiser.depth = 8 if argument == "pair64" else 4
    config.models.denoiser.heads = 6 if argument == "pair64" else 4
    config.models.denoiser.context_length = config.data.text_length
    config.models.denoiser.long_skip = "concat"
    config.models.denoiser.time = "token"
    config.models.denoiser.convolution = "none"
    config.models.denoiser.positions = "sincos_2d"
    config.mesh.rules = FIRST_STAGE + UVIT
    if argument == "debug":
        shrink_latent(config)
        config.models.denoiser.patch_size = 2
        config.models.denoiser.width = 32
        config.models.denoiser.depth = 2
    config.lock()
    return config
