"""Stage 2 on `scenes`: a transformer over caption and picture tokens.

Paper: Ramesh et al. 2021, section 2.2.

    python -m train --config=configs/scenes/dalle.py --workdir=runs/dalle      (needs runs/dvae)

Hardware and time: one CPU core, 7 minutes. Expect 97 % of validation captions with every attribute right and 89 % of
held-out ones (`python -m evaluation --run=runs/dalle --num=500`).

Arguments: `single32` (default; what `make demo` trains), `pair32` (31 minutes of one core, after stage 1 with the same
argument; 97 % and 93 %), `vqgan` (over the tokens of `configs/scenes/autoencoder.py:vq` in runs/vqgan, which nobody has
measured), `debug` (seconds; needs no other run).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug, muon_of
from configs.mesh_rules import FROZEN_CONVOLUTIONS, FROZEN_VQGAN, TRANSFORMER, WHOLE
from configs.scenes import autoencoder, dvae


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("single32", "pair32", "vqgan", "debug"))
    quantized = argument == "vqgan"
    stage1 = autoencoder.get_config("vq") if quantized else dvae.get_config(argument)
    part = "autoencoder" if quantized else "dvae"
    tokenizer = stage1.models[part]
    config = get_defaults()
    config.objective = "dalle"
    config.steps = 2400
    config.batch_size = 32

    config.data.dataset = stage1.data.dataset
    config.data.image_size = 32
    config.data.cache = True
    config.data.text_length = 20 if argument == "pair32" else 12
    config.data.bpe_dropout = 0.0
    config.data.image_tokens = ""  # "auto" or a folder: those that scripts.precompute stored

    config.frozen.dvae = ConfigDict(tokenizer.to_dict())  # the run's own sizes replace these
    config.frozen.dvae.source = "runs/vqgan" if quantized else "runs/dvae"
    config.frozen.dvae.part = part
    config.frozen.dvae.step = 0  # its newest checkpoint when this run begins

    config.initialize.dalle = ConfigDict({"source": "", "part": "dalle"})  # a run to fine-tune from
    config.models.dalle = ConfigDict()
    config.models.dalle.name = "dalle"
    config.models.dalle.text_vocab_size = 512
    config.models.dalle.text_length = config.data.text_length
    config.models.dalle.image_vocab_size = tokenizer.vocab_size
    config.models.dalle.image_grid = (8, 8)
    config.models.dalle.width = 160
    config.models.dalle.depth = 4
    config.models.dalle.heads = 2
    config.models.dalle.mlp_ratio = 3.0
    config.models.dalle.activation = "relu_squared"
    config.models.dalle.attention = "full"
    config.models.dalle.conv_kernel = 11  # of layers of type "conv", which "published" has
    config.models.dalle.conv_edge = "wraparound"
    config.models.dalle.implementation = "auto"
    config.models.dalle.scan = False
    config.models.dalle.remat = "none"
    config.models.dalle.dtype = "float32"

    config.loss.text_weight = 1 / 64  # published 1/8; docs/results.md compares
    config.loss.image_weight = 63 / 64
    config.loss.mask_pads = False
    config.loss.caption_dropout = 0.1

    config.sample.guidance = 1.5
    config.sample.temperature = 0.5
    config.sample.top_k = 0
    config.sample.top_p = 1.0

    config.optimizer.rules = muon_of(r"blocks_\d+/.*kernel$")
    config.optimizer.b2 = 0.96
    config.optimizer.weight_decay = 0.045
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.peak = 2e-3
    config.optimizer.schedule.warmup_steps = 100
    config.ema.decay = 0.995

    config.mesh.rules = (FROZEN_VQGAN if quantized else ()) + TRANSFORMER + FROZEN_CONVOLUTIONS + WHOLE

    config.checkpoint.every = 600
    config.evaluate.every = 600
    config.log.every = 20
    if argument == "pair32":
        config.steps = 10000
    if argument == "debug":
        make_debug(config, steps=4, batch_size=8)
        config.models.dalle.width = 32
        config.models.dalle.depth = 3
        config.models.dalle.attention = "published"
        config.models.dalle.conv_kernel = 5
        config.frozen.dvae.source = "random"
    config.lock()
    return config
