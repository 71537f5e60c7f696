"""Denoising diffusion as published: unconditional CIFAR-10 with a UNet.

Paper: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", section 4 and appendix B.

    python -m train --config=configs/paper/ddpm.py --workdir=runs/ddpm_cifar10
    python -m evaluation --run=runs/ddpm_cifar10 --metrics=fid,inception_score --splits=train --num=50000 \
        --features=inception:FILE

Hardware in the paper: a TPU v3-8, 10.6 hours. The paper's result: FID 3.17 with the training set, Inception score 9.46,
of 50,000 pictures and the authors' Inception network. No result of this config was measured here. The dataset is TFDS's
`cifar10`, which the user prepares. Parameters: 35,746,307.

Hyper-parameters are those of the authors' code (github.com/hojonathanho/diffusion). The 800,000 updates, the hardware
and the time stand in the paper alone; they were taken from a summary of it and not checked against its text. The result
is that of its abstract. What differs from the code, as far as known: gradients are clipped at norm 1 as a whole, there
those of each TPU core's share of the batch. The moving average has no warm-up, as there, so that early previews are of
almost the initial network.

Arguments: `cifar10` (default), `debug` (seconds; on scenes).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_diffusion_sampling, get_process, make_debug
from configs.mesh_rules import UNET


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("cifar10", "debug"))
    config = get_defaults()
    config.objective = "diffusion"
    config.steps = 800_000
    config.batch_size = 128

    config.data.dataset = "cifar10"
    config.data.validation_split = "test"
    config.data.image_size = 32
    config.data.transform = "center_square_flip"
    config.data.cache = True
    config.data.workers = 4

    config.initialize.denoiser = ConfigDict({"source": "", "part": "denoiser"})  # a run to fine-tune from
    config.models.denoiser = ConfigDict()
    config.models.denoiser.name = "unet"
    config.models.denoiser.image_size = 32
    config.models.denoiser.in_channels = 3
    config.models.denoiser.width = 128
    config.models.denoiser.multipliers = (1, 2, 2, 2)
    config.models.denoiser.attention_levels = (1,)  # 16 x 16
    config.models.denoiser.blocks = 2
    config.models.denoiser.heads = 1
    config.models.denoiser.groups = 32
    config.models.denoiser.dropout = 0.1
    config.models.denoiser.sine_first = True
    config.models.denoiser.last_period = True
    config.models.denoiser.norm_epsilon = 1e-6
    config.models.denoiser.downsample_padding = (0, 1)
    config.models.denoiser.kernel_init = "fan_avg"
    config.models.denoiser.implementation = "auto"
    config.models.denoiser.dtype = "float32"

    config.process = get_process({"name": "discrete", "kind": "linear", "steps": 1000})
    config.process.schedule.start = 1e-4
    config.process.schedule.end = 0.02
    config.process.prediction = "eps"
    config.process.variance = "large"
    config.process.clip = True

    config.loss.dropout = 0.0  # there is no condition to drop

    config.sample = get_diffusion_sampling("ddpm", steps=1000)

    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.name = "warmup_steps_down"  # constant behind the warm-up
    config.optimizer.schedule.peak = 2e-4
    config.optimizer.schedule.warmup_steps = 5000
    config.ema.decay = 0.9999
    config.ema.warm_up = False

    config.mesh.rules = UNET
    config.mesh.topology = "v5e:2x4"  # see docs/tpu.md

    config.checkpoint.every = 5000
    config.evaluate.every = 20_000
    config.evaluate.previews = 16
    config.log.every = 100
    if argument == "debug":
        make_debug(config, steps=4, batch_size=8)
        config.data.validation_split = "validation"
        config.models.denoiser.width = 8
        config.models.denoiser.multipliers = (1, 2)
        config.models.denoiser.groups = 4
        config.models.denoiser.blocks = 1
        config.sample.steps = 3
    config.lock()
    return config
