"""Diffusion in the latents of a first stage on `scenes`, with a small UNet that reads captions by cross-attention.

Paper: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.2 and 3.3.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/autoencoder.py --workdir=runs/autoencoder
    python -m train --config=configs/scenes/latent_unet.py --workdir=runs/latent_unet

The first stage is `config.frozen.first_stage`, whose run says what latents are multiplied by; here they are 8 x 8 x 4.
Captions and optimizer are those of `configs/scenes/ddpm_unet.py`. The process is rectified flow's line, with times
about its middle (Esser et al. 2024) and the data predicted, whose estimates are not clipped.

Hardware and time: one CPU core, 16 minutes, after which nearly all captions are right, held-out ones too
(docs/results.md).

Arguments: `single32` (default), `pair64` (pictures of 64 x 64 with up to three objects, latents of 16 x 16, a larger
network, for a GPU; first stage runs/autoencoder_pair64, of `autoencoder.py:pair64`), `debug` (seconds; a random first
stage).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.mesh_rules import FIRST_STAGE, UNET
from configs.scenes import autoencoder
from configs.scenes.ddpm_uvit import get_training, shrink

ARGUMENTS = ("single32", "pair64", "debug")


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ARGUMENTS)
    config = get_latent_training(argument)
    if argument == "single32":
        config.steps = 2800  # an update takes longer here than with the other backbones
    config.models.denoiser.name = "unet"
    config.models.denoiser.width = 192 if argument == "pair64" else 64
    config.models.denoiser.multipliers = (1, 2)
    config.models.denoiser.attention_levels = (0, 1)
    config.models.denoiser.attention = "transformer"
    config.models.denoiser.blocks = 1
    config.models.denoiser.head_width = 48 if argument == "pair64" else 32
    config.models.denoiser.groups = 8
    config.mesh.rules = FIRST_STAGE + UNET
    if argument == "debug":
        shrink_latent(config)
        config.models.denoiser.multipliers = (1,)
        config.models.denoiser.attention_levels = (0,)
        config.models.denoiser.width = 16
        config.models.denoiser.head_width = 16
        config.models.denoiser.groups = 4  # a channel that is normalized alone has no use for a bias before it
    config.lock()
    return config


def get_latent_training(argument: str) -> ConfigDict:
    """What all backbones share that learn latents: the first stage, and what `ddpm_uvit.get_training` has."""
    config = get_training(pairs=argument == "pair64")
    config.process.schedule = ConfigDict({"name": "flow"})
    config.process.times = "logit_normal"
    config.process.clip = False
    config.process.sigma_data = 1.0  # of prediction edm: that of latents as the first stage scales them
    config.data.latent_moments = ""  # "auto" or a folder: those that scripts.precompute stored
    config.steps = 5500
    config.checkpoint.every = 500
    config.evaluate.every = 1000
    stage = autoencoder.get_config({"single32": "kl"}.get(argument, argument)).models.autoencoder
    config.frozen.first_stage = ConfigDict(stage.to_dict())  # the run's own sizes replace these
    config.frozen.first_stage.source = "runs/autoencoder"
    config.frozen.first_stage.part = "autoencoder"
    config.frozen.first_stage.step = 0  # its newest checkpoint when this run begins
    if argument == "pair64":
        config.steps = 20_000
        config.batch_size = 128
        config.data.dataset = "scenes/pair64"
        config.data.image_size = 64
        config.data.text_length = config.models.text.text_length = 28
        config.models.text.text_vocab_size = 393
        config.models.text.width = config.models.denoiser.context_width = 256
        config.models.text.layers = 4
        config.models.text.heads = 4
        config.frozen.first_stage.source = "runs/autoencoder_pair64"
        config.checkpoint.every = config.evaluate.every = 2500
        config.checkpoint.keep = 2
    config.models.denoiser.image_size = config.data.image_size // (stage.patch_size * 2 ** (len(stage.multipliers) - 1))
    config.models.denoiser.in_channels = stage.latent_channels
    return config


def shrink_latent(config: ConfigDict) -> None:
    """What the debug variants of all backbones change."""
    shrink(config)
    config.frozen.first_stage.source = "random"
