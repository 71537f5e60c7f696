"""The 12-billion-parameter transformer of DALL-E as published: 256 text and 1024 image tokens.

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.2 and appendix B.

    python -m train --config=configs/paper/dalle_12b.py --workdir=runs/dalle_12b --config.data.dataset=... \
        --config.frozen.dvae.source=runs/dvae_paper

Hardware in the paper: 1024 V100 GPUs, 430,000 updates of 1024 pairs. No result of this config was measured here. The
paper halves the learning rate five times by hand, when the loss stops falling; when, it does not say, so the
boundaries below are placeholders to be set by whoever watches the curve. The paper's fp16 machinery (gradient scaling
per block, PowerSGD) is replaced by bfloat16. `debug` runs a tiny size on `scenes` in seconds.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug
from configs.mesh_rules import FROZEN_CONVOLUTIONS, TRANSFORMER, WHOLE
from configs.paper import dvae


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("published", "debug"))
    stage1 = dvae.get_config(argument)
    config = get_defaults()
    config.objective = "dalle"
    config.steps = 430_000
    config.batch_size = 1024

    config.data.dataset = "conceptual_captions"
    config.data.image_size = 256
    config.data.transform = "dalle_training"
    config.data.text_length = 256
    config.data.bpe_dropout = 0.1
    config.data.image_tokens = ""  # "auto" or a folder: those that scripts.precompute stored
    config.data.workers = 16

    config.frozen.dvae = ConfigDict(stage1.models.dvae.to_dict())
    config.frozen.dvae.source = "runs/dvae_paper"
    config.frozen.dvae.part = "dvae"
    config.frozen.dvae.step = 0  # its newest checkpoint when this run begins

    config.models.dalle = ConfigDict()
    config.models.dalle.name = "dalle"
    config.models.dalle.text_vocab_size = 16_384
    config.models.dalle.text_length = 256
    config.models.dalle.image_vocab_size = 8192
    config.models.dalle.image_grid = (32, 32)
    config.models.dalle.width = 3968
    config.models.dalle.depth = 64
    config.models.dalle.heads = 62
    config.models.dalle.mlp_ratio = 4.0
    config.models.dalle.activation = "gelu"
    config.models.dalle.attention = "published"
    config.models.dalle.conv_kernel = 11
    config.models.dalle.conv_edge = "wraparound"
    config.models.dalle.implementation = "auto"
    config.models.dalle.scan = True
    config.models.dalle.remat = "full"
    config.models.dalle.dtype = "bfloat16"

    config.loss.text_weight = 1 / 8
    config.loss.image_weight = 7 / 8
    config.loss.mask_pads = False
    config.loss.caption_dropout = 0.0

    config.sample.guidance = 1.0
    config.sample.temperature = 1.0
    config.sample.top_k = 0
    config.sample.top_p = 1.0

    config.optimizer.b2 = 0.96
    config.optimizer.weight_decay = 4.5e-2
    config.optimizer.clip_norm = 4.0
    config.optimizer.schedule.name = "warmup_steps_down"
    config.optimizer.schedule.peak = 4.5e-4
    config.optimizer.schedule.warmup_steps = 5_000
    config.optimizer.schedule.boundaries = (150_000, 220_000, 290_000, 350_000, 400_000)
    config.optimizer.schedule.factor = 0.5
    config.ema.decay = 0.99
    config.ema.every = 25
    config.ema.warm_up = False

    config.mesh.rules = TRANSFORMER + FROZEN_CONVOLUTIONS + WHOLE
    config.mesh.fsdp = 64  # must divide 3968 = 2^7 31, and 64, the narrowest layer of the discrete VAE
    config.mesh.topology = "v5e:16x16"  # see docs/tpu.md

    config.checkpoint.every = 1_000
    config.evaluate.every = 5_000
    if argument == "debug":
        make_debug(config, steps=2, batch_size=4)
        config.data.text_length = config.models.dalle.text_length = 12
        config.frozen.dvae.source = "random"
        config.models.dalle.text_vocab_size = 512
        config.models.dalle.image_vocab_size = 64
        config.models.dalle.image_grid = (4, 4)
        config.models.dalle.width = 32
        config.models.dalle.heads = 2
        config.models.dalle.depth = 3
    config.lock()
    return config
