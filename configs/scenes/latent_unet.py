"""Diffusion in the latents of a first stage on `scenes`, with a small UNet that reads captions by cross-attention.

Paper: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.2 and 3.3.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/autoencoder.py --workdir=runs/autoencoder
    python -m train --config=configs/scenes/latent_unet.py --workdir=runs/latent_unet

The first stage is `config.frozen.first_stage`, whose run says what latents are multiplied by; here they are 8 x 8 x 4.
Captions, process and optimizer are those of `configs/scenes/ddpm_unet.py`, but for estimates of the data, which are not
clipped. Not measured yet.

Arguments: `single32` (default), `debug` (seconds; a random first stage).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.mesh_rules import FIRST_STAGE, UNET
from configs.scenes import autoencoder
from configs.scenes.ddpm_uvit import get_training, shrink


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("single32", "debug"))
    config = get_training(pairs=False)
    config.process.clip = False
    stage = autoencoder.get_config("debug" if argument == "debug" else "kl").models.autoencoder
    config.frozen.first_stage = ConfigDict(stage.to_dict())  # the run's own sizes replace these
    config.frozen.first_stage.source = "runs/autoencoder"
    config.frozen.first_stage.part = "autoencoder"
    config.frozen.first_stage.step = 0  # its newest checkpoint when this run begins

    config.models.denoiser.name = "unet"
    config.models.denoiser.image_size = 32 // 2 ** (len(stage.multipliers) - 1)
    config.models.denoiser.in_channels = stage.latent_channels
    config.models.denoiser.width = 96
    config.models.denoiser.multipliers = (1, 2)
    config.models.denoiser.attention_levels = (0, 1)
    config.models.denoiser.attention = "transformer"
    config.models.denoiser.blocks = 1
    config.models.denoiser.head_width = 48
    config.models.denoiser.groups = 8
    config.mesh.rules = FIRST_STAGE + UNET

    config.steps = 3500
    config.checkpoint.every = 500
    config.evaluate.every = 1000
    if argument == "debug":
        shrink(config)
        config.frozen.first_stage.source = "random"
        config.models.denoiser.multipliers = (1,)
        config.models.denoiser.attention_levels = (0,)
        config.models.denoiser.width = 16
        config.models.denoiser.head_width = 16
        config.models.denoiser.groups = 4  # a channel that is normalized alone has no use for a bias before it
    config.lock()
    return config
