"""The first stages of latent diffusion as published: 256 x 256 pictures to latents 4 to 32 times smaller a side.

Paper: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 and appendix G.

    python -m scripts.convert --input=vgg16-397923af.pth --lins=FILE --output=pretrained/lpips
    python -m train --config=configs/paper/autoencoder.py --workdir=runs/kl_f8 --config.data.data_dir=...
    python -m train --config=configs/paper/autoencoder.py:vq_f4 --workdir=runs/vq_f4 --config.data.data_dir=...

LPIPS needs VGG-16 of torchvision and the linear layers of the lpips package: docs/weights.md says how to get them. The
dataset is TFDS's `open_images_v4`, which the user prepares.

Numbers are those of the released models' configs (github.com/CompVis/latent-diffusion, models/first_stage_models):
OpenImages, the short side resized to 384 and random squares of 256 taken (vq-f4's names no resizing); batches of 10, 4,
6 and 6 a GPU for kl-f4, f8, f16 and f32, of 8, 10 and 14 for vq-f4, f8 and f16; Adam(0.5, 0.9) at a constant 4.5e-6
times the batch over all GPUs. How many GPUs there were is not published: there are 8 devices here. Updates are those of
the authors' table (177, 247, 443, 407, 533 and 971 thousand; for vq-f16, which is not in it, those of vq-f8). Results
in their table, on the validation split of OpenImages: kl-f8 rFID 0.90 and 24.19 dB, vq-f4 rFID 0.58 and 27.43 dB. No
result of this config was measured here.

What differs: both sides take their step at once (`train/objectives/autoencoder.py`); the network computes in bfloat16;
the output's variance, which the published code declares and never trains, is left out
(`--config.loss.output_variance=True` trains it).

Arguments: `kl_f8` (default, 83,653,863 parameters; Stable Diffusion's), `kl_f4` (55,312,063), `kl_f16` (69,610,963),
`kl_f32` (103,880,131), `vq_f4` (55,322,782), `vq_f8` (67,717,295), `vq_f16` (69,593,371), `debug` (seconds; on scenes).
The discriminator has 2,765,633 parameters more, those of vq-f8 and vq-f16 663,361.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug
from configs.mesh_rules import AUTOENCODER

# Multipliers of the levels, channels of latents, levels with attention, codes, batch of a device, updates.
SIZES = {
    "kl_f8": ((1, 2, 4, 4), 4, (), 0, 4, 247_000),
    "kl_f4": ((1, 2, 4), 3, (), 0, 10, 177_000),
    "kl_f16": ((1, 1, 2, 2, 4), 16, (4,), 0, 6, 443_000),
    "kl_f32": ((1, 1, 2, 2, 4, 4), 64, (4, 5), 0, 6, 407_000),
    "vq_f4": ((1, 2, 4), 3, (), 8192, 8, 533_000),
    "vq_f8": ((1, 2, 2, 4), 4, (3,), 16384, 10, 971_000),
    "vq_f16": ((1, 1, 2, 2, 4), 8, (4,), 16384, 14, 971_000),
}
# Of models with a codebook: when the discriminator begins, its weight and its layers of stride 2.
ADVERSARIES = {"vq_f4": (0, 0.75, 3), "vq_f8": (1, 0.6, 2), "vq_f16": (250_001, 0.75, 2)}
DEVICES = 8


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, (*SIZES, "debug"))
    size = "kl_f8" if argument == "debug" else argument
    multipliers, channels, attention_levels, codes, batch_size, steps = SIZES[size]
    start, weight, layers = ADVERSARIES.get(size, (50_001, 0.5, 3))
    config = get_defaults()
    config.objective = "autoencoder"
    config.steps = steps
    config.batch_size = batch_size * DEVICES

    config.data.dataset = "open_images_v4"
    config.data.image_size = 256
    config.data.transform = "first_stage_training"
    config.data.workers = 16

    config.models.autoencoder = ConfigDict()
    config.models.autoencoder.name = "autoencoder_vq" if codes else "autoencoder_kl"
    config.models.autoencoder.image_size = 256
    config.models.autoencoder.width = 128
    config.models.autoencoder.multipliers = multipliers
    config.models.autoencoder.attention_levels = attention_levels
    config.models.autoencoder.blocks = 2
    config.models.autoencoder.latent_channels = channels
    config.models.autoencoder.groups = 32
    config.models.autoencoder.remat = "none"
    config.models.autoencoder.dtype = "bfloat16"
    if codes:
        config.models.autoencoder.vocab_size = codes
    config.models.discriminator = ConfigDict()
    config.models.discriminator.name = "discriminator"
    config.models.discriminator.image_size = 256
    config.models.discriminator.layers = layers
    config.models.discriminator.width = 64
    config.models.discriminator.dtype = "bfloat16"
    config.frozen.lpips = ConfigDict()
    config.frozen.lpips.name = "lpips"
    config.frozen.lpips.image_size = 256
    config.frozen.lpips.widths = (64, 128, 256, 512, 512)
    config.frozen.lpips.dtype = "bfloat16"
    config.frozen.lpips.source = "pretrained/lpips"
    config.frozen.lpips.part = "lpips"

    config.loss.reduction = "mean" if codes else "sum"
    config.loss.output_variance = False
    config.loss.perceptual_weight = 1.0
    if codes:
        config.loss.codebook_weight = 1.0
        config.loss.commitment = 0.25
        config.loss.legacy_commitment = True
    else:
        config.loss.kl_weight = 1e-6
    config.loss.discriminator_weight = weight
    config.loss.discriminator_start = start

    config.optimizer.b1 = 0.5
    config.optimizer.b2 = 0.9
    config.optimizer.schedule.name = "constant"
    config.optimizer.schedule.peak = 4.5e-6 * config.batch_size
    config.optimizer.rules = ({"pattern": "^(autoencoder|output)/"}, {"pattern": "^discriminator/"})

    config.mesh.rules = AUTOENCODER
    config.mesh.topology = "v5e:2x4"  # see docs/tpu.md

    config.checkpoint.every = 5_000
    config.evaluate.every = 10_000
    config.log.every = 100
    if argument == "debug":
        make_debug(config, steps=2, batch_size=4)
        side = config.data.image_size
        config.models.autoencoder.image_size = config.models.discriminator.image_size = side
        config.models.autoencoder.width = 8
        config.models.autoencoder.multipliers = (1, 2)
        config.models.autoencoder.blocks = 1
        config.models.autoencoder.groups = 4
        config.models.discriminator.width = 8
        config.models.discriminator.layers = 2
        config.frozen.lpips.image_size = side
        config.frozen.lpips.widths = (4, 4, 8, 8, 8)
        config.frozen.lpips.source = "random"
        config.loss.discriminator_start = 1
    config.lock()
    return config
