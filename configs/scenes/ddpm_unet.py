"""Diffusion of pixels on `scenes` with a small UNet that reads captions by cross-attention.

Paper: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", with the cross-attention of Rombach et al. 2022,
section 3.3. Patches of 2 x 2 pixels are folded into channels (Luhman & Luhman 2022), as convolutions at full resolution
are what a CPU is slowest at.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/ddpm_unet.py --workdir=runs/ddpm_unet

Hardware and time: 37 minutes on one CPU core of its own, or 26 to 31 on two, after which 99.6 % of validation captions
and 97.0 % of held-out ones are drawn right; docs/results.md has what comes before.

Captions are read by a small transformer that is trained with the denoiser, as in `configs/scenes/ddpm_uvit.py`, with
which this shares data, process, sampler and optimizer.

Arguments: `single32` (default; one object), `pair32` (one or two objects with a relation), `debug` (seconds).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.mesh_rules import UNET
from configs.scenes.ddpm_uvit import get_training, shrink


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("single32", "pair32", "debug"))
    config = get_training(pairs=argument == "pair32")
    config.models.denoiser.name = "unet"
    config.models.denoiser.in_channels = 3
    config.models.denoiser.patch_size = 2
    config.models.denoiser.width = 48
    config.models.denoiser.multipliers = (1, 2)
    config.models.denoiser.attention_levels = (1,)
    config.models.denoiser.attention = "transformer"
    config.models.denoiser.blocks = 1
    config.models.denoiser.head_width = 48
    config.models.denoiser.groups = 8
    config.mesh.rules = UNET

    config.steps = 3500
    config.checkpoint.every = 500
    config.evaluate.every = 1000
    if argument == "debug":
        shrink(config)
        config.models.denoiser.attention_levels = ()  # the middle reads captions too
        config.models.denoiser.width = 16
        config.models.denoiser.head_width = 16
        config.models.denoiser.groups = 4  # a channel that is normalized alone has no use for a bias before it
    config.lock()
    return config
