"""Stage 1 on `scenes`: a vector-quantized autoencoder, 8 x 8 tokens for a 32 x 32 picture.

Paper: Ramesh et al. 2021, section 2.1 (the discrete VAE); van den Oord et al. 2017 (vector quantization, which small
budgets need: docs/results.md compares the two).

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/dvae.py --workdir=runs/dvae

Hardware and time: one CPU core, 1.8 minutes. Expect 100 % of scenes read right after encoding and decoding
(`python -m evaluation --run=runs/dvae --num=500`), mean squared error 0.0007.

Arguments: `single32` (default; what `make demo` trains), `pair32` (4.5 minutes of one core; 97 % and 96 %), `gumbel`
(the published relaxation at the same size, on single32), `debug` (seconds).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug, muon_of
from configs.mesh_rules import CONVOLUTIONS, WHOLE


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("single32", "pair32", "gumbel", "debug"))
    config = get_defaults()
    config.objective = "dvae" if argument == "gumbel" else "vqvae"
    config.steps = 2000 if argument == "gumbel" else 1600
    config.batch_size = 64

    config.data.dataset = "scenes/pair32" if argument == "pair32" else "scenes/single32"
    config.data.image_size = 32
    config.data.cache = True

    config.initialize.dvae = ConfigDict({"source": "", "part": "dvae"})  # a run to fine-tune from
    config.models.dvae = ConfigDict()
    config.models.dvae.name = config.objective
    config.models.dvae.image_size = 32
    config.models.dvae.vocab_size = 256
    config.models.dvae.encoder_hidden = 96
    config.models.dvae.decoder_hidden = 96
    config.models.dvae.patch_size = 4
    config.models.dvae.width_multipliers = (1,)
    config.models.dvae.blocks_per_group = 2
    config.models.dvae.input_kernel = 3
    config.models.dvae.dtype = "float32"

    config.loss.reconstruction = "l2"
    if config.objective == "vqvae":
        config.models.dvae.code_dim = 16
        config.loss.commitment = 0.25
        config.loss.codebook_decay = 0.98
        config.loss.restart_every = 50
        config.loss.restart_threshold = 0.1
    else:
        config.models.dvae.code_stddev = 1.0  # one-hot codes meet a first layer of unit scale
        config.loss.kl_weight_start = 0.0
        config.loss.kl_weight = 0.0
        config.loss.kl_weight_steps = 1000
        config.loss.temperature_start = 1.0
        config.loss.temperature = 1 / 16
        config.loss.temperature_steps = 2000
        config.loss.straight_through = False

    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.peak = 2e-3
    if config.objective == "vqvae":
        config.optimizer.schedule.peak = 4e-3
        config.optimizer.rules = muon_of(r"group_\d+_block_\d+/.*kernel$")
    config.optimizer.schedule.warmup_steps = 50
    config.ema.decay = 0.99

    config.mesh.rules = CONVOLUTIONS + WHOLE

    config.checkpoint.every = 400
    config.evaluate.every = 400
    config.log.every = 20
    if argument == "pair32":
        config.steps = 4000
        config.models.dvae.vocab_size = 512
    if argument == "debug":
        make_debug(config, steps=4, batch_size=8)
        config.models.dvae.encoder_hidden = config.models.dvae.decoder_hidden = 16
        config.models.dvae.blocks_per_group = 1
    config.lock()
    return config
