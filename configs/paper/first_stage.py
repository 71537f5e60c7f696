"""The first stages of latent diffusion as published: autoencoders with a Gaussian (`kl`) or a codebook (`vq`).

Paper: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 and appendix G;
kl_f8 is Stable Diffusion's.

    python -m train --config=configs/paper/first_stage.py --workdir=runs/kl_f8
    python -m train --config=configs/paper/first_stage.py:vq_f4 --workdir=runs/vq_f4
    python -m evaluation --run=runs/kl_f8 --metrics=fid --num=5000 --features=inception:FILE

Arguments, parameters of the autoencoder, and the authors' FID of reconstructions, PSNR and updates: `kl_f8` (default;
83,653,863; 0.90; 24.2; 246,803), `kl_f4` (55,312,063; 0.27; 27.5; 176,991), `kl_f16` (69,610,963; 0.87; 24.1; 442,998),
`kl_f32` (103,880,131; 2.04; 22.3; 406,763), `vq_f4` (8192 codes; 55,322,782; 0.58; 27.4; 533,066), `vq_f8` (16,384;
67,717,295; 1.14; 23.1; 971,043), `vq_f16` (16,384; 69,593,371; 5.15; 20.8; 1,101,166), `debug` (seconds; on scenes,
with random LPIPS). The discriminators have 2,765,633 parameters, those of vq_f8 and vq_f16 663,361.

Hardware: how many GPUs, and for how long, the authors do not say. No result of this config was measured here. The
dataset is TFDS's `open_images_v4`, which the user prepares; docs/weights.md says how LPIPS becomes pretrained/lpips.

Hyper-parameters are those of the configs released with these models (github.com/CompVis/latent-diffusion, commit
a506df5). The learning rate is 4.5e-6 times the examples of an update, so that it goes with another `batch_size`; theirs
has 4 to 14 on each of an unknown number of GPUs, here as many on each of 8. KL models are trained on sums over pixels,
with the discriminator from update 50,001 on; VQ models on means, with beta before the codes' term
(`loss.legacy_commitment=False` for the paper's) and starts of their own. What differs:

* Both sides of the loss take their step at once, there in turn.
* The variance of pixels is no parameter: there it is one that no optimizer is told of, so that it stays as it starts.
* LPIPS has no dropout; there it is left on in training, so it seems.
* Networks compute in bfloat16, there in float32.
* vq_f4's pictures are cut out of the originals there; here, as all others, out of ones whose short side is 384.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug
from configs.mesh_rules import AUTOENCODER

# argument -> (multipliers, levels with attention, channels of latents, codes)
NETWORKS = {
    "kl_f8": ((1, 2, 4, 4), (), 4, 0),
    "kl_f4": ((1, 2, 4), (), 3, 0),
    "kl_f16": ((1, 1, 2, 2, 4), (4,), 16, 0),
    "kl_f32": ((1, 1, 2, 2, 4, 4), (4, 5), 64, 0),
    "vq_f4": ((1, 2, 4), (), 3, 8192),
    "vq_f8": ((1, 2, 2, 4), (3,), 4, 16_384),
    "vq_f16": ((1, 1, 2, 2, 4), (4,), 8, 16_384),
    "debug": ((1, 2), (), 4, 0),
}

# argument -> (examples of a device, updates, weight and start of the adversarial terms, layers of the discriminator)
TRAINING = {
    "kl_f8": (4, 246_803, 0.5, 50_001, 3),
    "kl_f4": (10, 176_991, 0.5, 50_001, 3),
    "kl_f16": (6, 442_998, 0.5, 50_001, 3),
    "kl_f32": (6, 406_763, 0.5, 50_001, 3),
    "vq_f4": (8, 533_066, 0.75, 0, 3),
    "vq_f8": (10, 971_043, 0.6, 1, 2),
    "vq_f16": (14, 1_101_166, 0.75, 250_001, 2),
    "debug": (1, 4, 0.5, 1, 1),
}
DEVICES = 8
BASE_RATE = 4.5e-6  # of one example in an update


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, tuple(NETWORKS))
    examples, steps, weight, start, layers = TRAINING[argument]
    quantized = argument.startswith("vq")
    config = get_defaults()
    config.objective = "autoencoder"
    config.steps = steps
    config.batch_size = DEVICES * examples

    config.data.dataset = "open_images_v4"
    config.data.image_size = 256
    config.data.transform = "first_stage_training"
    config.data.workers = 16

    config.initialize.autoencoder = ConfigDict({"source": "", "part": "autoencoder"})  # a run to fine-tune from
    config.models.autoencoder = get_model(argument)
    config.models.discriminator = ConfigDict()
    config.models.discriminator.name = "discriminator"
    config.models.discriminator.image_size = 256
    config.models.discriminator.layers = layers
    config.models.discriminator.width = 64
    config.models.discriminator.dtype = "bfloat16"
    config.frozen.lpips = ConfigDict()
    config.frozen.lpips.name = "lpips"
    config.frozen.lpips.dtype = "bfloat16"
    config.frozen.lpips.source = "pretrained/lpips"
    config.frozen.lpips.part = "lpips"

    config.loss.reduction = "mean" if quantized else "sum"
    config.loss.output_variance = False
    config.loss.perceptual_weight = 1.0
    if quantized:
        config.loss.codebook_weight = 1.0
        config.loss.commitment = 0.25
        config.loss.legacy_commitment = True
    else:
        config.loss.kl_weight = 1e-6
    config.loss.discriminator_weight = weight
    config.loss.discriminator_start = start
    config.loss.measured_examples = 10_000  # pictures whose latents are measured at each save

    config.optimizer.b1 = 0.5
    config.optimizer.b2 = 0.9
    config.optimizer.schedule.name = "constant"
    config.optimizer.schedule.peak = BASE_RATE * config.batch_size
    config.optimizer.rules = ({"pattern": "^autoencoder/"}, {"pattern": "^discriminator/"})

    config.mesh.rules = AUTOENCODER
    config.mesh.topology = "v5e:2x4"  # see docs/tpu.md

    config.checkpoint.every = 5000
    config.evaluate.every = 5000
    config.evaluate.previews = 8
    config.log.every = 100
    if argument == "debug":
        make_debug(config, steps=steps, batch_size=config.batch_size)
        _shrink(config.models.autoencoder)
        config.models.discriminator.image_size = 32
        config.models.discriminator.width = 8
        config.frozen.lpips.source = "random"
        config.frozen.lpips.widths = (4, 4, 4, 4, 4)
        config.frozen.lpips.image_size = 32
    config.lock()
    return config


def get_frozen(argument: str, source: str, latent_scale: float) -> ConfigDict:
    """The autoencoder of an argument as `config.frozen.first_stage`.

    Args:
      argument: of this file.
      source: the run folder or converted one that it comes from, whose sizes then replace these; "random" for `debug`.
      latent_scale: what its latents are multiplied by, also where the source says something else, with a latent_shift
        of 0 before.
    """
    stage = get_model(argument)
    stage.latent_scale = latent_scale
    if argument == "debug":
        _shrink(stage)
    stage.source = "random" if argument == "debug" else source
    stage.part = "autoencoder"
    stage.step = 0  # its newest checkpoint when a run begins
    return stage


def get_model(argument: str) -> ConfigDict:
    """The autoencoder of an argument; latents of VQ models are multiplied by 1, of KL models by what is measured."""
    multipliers, attention_levels, channels, codes = NETWORKS[argument]
    model = ConfigDict()
    model.name = "autoencoder_vq" if codes else "autoencoder_kl"
    model.image_size = 256
    model.width = 128
    model.multipliers = multipliers
    model.attention_levels = attention_levels  # beside the middle
    model.blocks = 2
    model.latent_channels = channels
    model.groups = 32
    model.dtype = "bfloat16"
    model.latent_scale = 1.0 if codes else None  # None for what is measured
    model.latent_shift = 0.0
    if codes:
        model.vocab_size = codes
    return model


def _shrink(model: ConfigDict) -> None:
    """What the debug variants change of an autoencoder."""
    model.image_size = 32
    model.width = 8
    model.blocks = 1
    model.groups = 4  # a channel that is normalized alone has no use for a bias before it
