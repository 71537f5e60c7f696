"""Stage 1 on `drawings`: a vector-quantized autoencoder, 8 x 8 tokens for a drawing of 32 x 32 pixels.

Paper: Ramesh et al. 2021, section 2.1 (the discrete VAE) and listing 1 (augmentation); van den Oord et al. 2017.

    python -m scripts.prepare --dataset=drawings/emoji64
    python -m train --config=configs/drawings/dvae.py --workdir=runs/drawings_dvae
    python -m sample --run=runs/drawings_dvae --image=FILE --out=reconstruction.png

Hardware and time: 6 minutes on one CPU core.

Arguments: `emoji64` (default; 64 pixels, seen at 32), `debug` (seconds; on scenes).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.scenes import dvae


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("emoji64", "debug"))
    config = dvae.get_config("debug" if argument == "debug" else "")
    config.data.transform = "dvae_training"
    if argument != "debug":
        config.steps = 4500
        config.data.dataset = "drawings/emoji64"
        config.models.dvae.vocab_size = 512
        config.models.dvae.encoder_hidden = config.models.dvae.decoder_hidden = 128
        config.ema.decay = 0.995
        config.checkpoint.every = config.evaluate.every = 500
        config.evaluate.batches = 22
    return config
