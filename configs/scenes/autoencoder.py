"""The first stage of latent diffusion on `scenes`: 8 x 8 latents of 4 channels for a 32 x 32 picture.

Paper: Rombach et al. 2022, section 3.1 and appendix G, at one-thousandth of the size.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/autoencoder.py --workdir=runs/autoencoder

Hardware and time: 8 minutes on one CPU core, after which every scene is still right. Squares of 2 x 2 pixels are folded
into channels, and kernels of residual blocks are trained by Muon.

Arguments: `kl` (default), `vq` (a codebook of 256, of which it comes to use 45: 97.8 % of scenes are right, and 95.8 %
held out), `perceptual` (kl with LPIPS, whose weights docs/weights.md converts to pretrained/lpips), `pair64` (kl of
`scenes/pair64`, to 16 x 16 latents, for a GPU; not trained yet), `debug` (seconds). Without LPIPS there are the
absolute error and the discriminator: nobody's weights are needed.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug, muon_of
from configs.mesh_rules import AUTOENCODER


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("kl", "vq", "perceptual", "pair64", "debug"))
    quantized = argument == "vq"
    config = get_defaults()
    config.objective = "autoencoder"
    config.steps = 2000
    config.batch_size = 64

    config.data.dataset = "scenes/pair64" if argument == "pair64" else "scenes/single32"
    config.data.image_size = 64 if argument == "pair64" else 32
    config.data.cache = True

    config.initialize.autoencoder = ConfigDict({"source": "", "part": "autoencoder"})  # a run to fine-tune from
    config.models.autoencoder = ConfigDict()
    config.models.autoencoder.name = "autoencoder_vq" if quantized else "autoencoder_kl"
    config.models.autoencoder.image_size = config.data.image_size
    config.models.autoencoder.width = 64 if argument == "pair64" else 32
    config.models.autoencoder.multipliers = (1, 2)
    config.models.autoencoder.attention_levels = ()  # beside the middle
    config.models.autoencoder.blocks = 1
    config.models.autoencoder.patch_size = 2
    config.models.autoencoder.latent_channels = 4
    config.models.autoencoder.latent_scale = None  # what its latents are multiplied by; None for what is measured
    config.models.autoencoder.latent_shift = 0.0  # what is subtracted before, beside a latent_scale
    config.models.autoencoder.groups = 8
    config.models.autoencoder.dtype = "float32"
    if quantized:
        config.models.autoencoder.vocab_size = 256
        config.models.autoencoder.code_range = 1.0
    config.models.discriminator = ConfigDict()
    config.models.discriminator.name = "discriminator"
    config.models.discriminator.image_size = config.data.image_size
    config.models.discriminator.layers = 2
    config.models.discriminator.width = 16
    config.models.discriminator.dtype = "float32"
    if argument == "perceptual":
        config.frozen.lpips = ConfigDict()
        config.frozen.lpips.name = "lpips"
        config.frozen.lpips.source = "pretrained/lpips"
        config.frozen.lpips.part = "lpips"

    config.loss.reduction = "mean" if quantized else "sum"
    config.loss.output_variance = not quantized
    config.loss.perceptual_weight = 1.0 if argument == "perceptual" else 0.0
    if quantized:
        config.loss.codebook_weight = 1.0
        config.loss.commitment = 0.25
        config.loss.legacy_commitment = True
    else:
        config.loss.kl_weight = 1e-6
    config.loss.discriminator_weight = 0.5
    config.loss.discriminator_start = 800
    config.loss.measured_examples = 10_000  # pictures whose latents are measured at each save

    config.optimizer.b1 = 0.5
    config.optimizer.b2 = 0.9
    config.optimizer.schedule.peak = 2e-3
    config.optimizer.schedule.warmup_steps = 50
    hidden, others = muon_of(r"^autoencoder/.*residual.*/kernel$")
    config.optimizer.rules = (hidden, others | {"pattern": "^(autoencoder|output)/"}, {"pattern": "^discriminator/"})
    config.ema.decay = 0.99
    config.ema.paths = "^autoencoder/"

    config.mesh.rules = AUTOENCODER

    config.checkpoint.every = 500
    config.evaluate.every = 500
    config.log.every = 20
    if argument == "debug":
        make_debug(config, steps=4, batch_size=8)
        config.models.autoencoder.width = 8
        config.models.autoencoder.groups = 4  # a channel that is normalized alone has no use for a bias before it
        config.models.discriminator.width = 8
        config.models.discriminator.layers = 1
        config.loss.discriminator_start = 1
    config.lock()
    return config
