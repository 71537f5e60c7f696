"""The discrete VAE of DALL-E as published: 256 x 256 pictures to 32 x 32 tokens of 8192.

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.1 and appendix A.

    python -m train --config=configs/paper/dvae.py --workdir=runs/dvae_paper --config.data.dataset=...

Hardware in the paper: 64 V100 GPUs, 3 million updates of 512 pictures. No result of this config was measured here.
Parameters: 53,786,240 (encoder) + 43,829,766 (decoder). The dataset is the user's: any prepared TFDS dataset with
`image`. `debug` runs one-thousandth of the size on `scenes` in seconds.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug
from configs.mesh_rules import CONVOLUTIONS, WHOLE


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("published", "debug"))
    config = get_defaults()
    config.objective = "dvae"
    config.steps = 3_000_000
    config.batch_size = 512

    config.data.dataset = "imagenet2012"
    config.data.image_size = 256
    config.data.transform = "dvae_training"
    config.data.workers = 16

    config.models.dvae = ConfigDict()
    config.models.dvae.name = "dvae"
    config.models.dvae.image_size = 256
    config.models.dvae.vocab_size = 8192
    config.models.dvae.encoder_hidden = 256
    config.models.dvae.decoder_hidden = 256
    config.models.dvae.decoder_init = 128
    config.models.dvae.width_multipliers = (1, 2, 4, 8)
    config.models.dvae.blocks_per_group = 2
    config.models.dvae.input_kernel = 7
    config.models.dvae.dtype = "bfloat16"

    config.loss.reconstruction = "logit_laplace"
    config.loss.kl_weight_start = 0.0
    config.loss.kl_weight = 6.6
    config.loss.kl_weight_steps = 5_000
    config.loss.temperature_start = 1.0
    config.loss.temperature = 1 / 16
    config.loss.temperature_steps = 150_000
    config.loss.straight_through = False

    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule.peak = 1e-4
    config.optimizer.schedule.end = 1.25e-6
    config.optimizer.schedule.decay_steps = 1_200_000
    config.ema.decay = 0.999
    config.ema.warm_up = False

    config.mesh.rules = CONVOLUTIONS + WHOLE
    config.mesh.topology = "v5e:8x8"  # see docs/tpu.md

    config.checkpoint.every = 5_000
    config.evaluate.every = 10_000
    if argument == "debug":
        make_debug(config, steps=2, batch_size=4)
        config.models.dvae.image_size = config.data.image_size
        config.models.dvae.vocab_size = 64
        config.models.dvae.encoder_hidden = config.models.dvae.decoder_hidden = 8
        config.models.dvae.decoder_init = 8
        config.models.dvae.blocks_per_group = 1
    config.lock()
    return config
