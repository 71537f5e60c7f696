"""Stage 2 on `drawings`: a transformer over the name of a drawing and its tokens.

Paper: Ramesh et al. 2021, section 2.2, and listing 2 (augmentation).

    python -m train --config=configs/drawings/dalle.py --workdir=runs/drawings_dalle      (needs runs/drawings_dvae)
    python -m sample --run=runs/drawings_dalle --prompt="red apple on a pink background" --num=8

Hardware and time: 39 minutes on one CPU core that other programs shared for a part of them, 26 where it runs at the
3.5 updates a second that it began with. Beside the 6 minutes of stage 1.

Pictures are kept at 64 pixels, and cut out of them as published for this stage: never flipped, since names say left
and right. Captions are drawn from all that a picture has, and spelt in other pieces each time (BPE dropout).

Arguments: `emoji64` (default; 64 pixels, seen at 32), `debug` (seconds; on scenes; needs no other run).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.drawings import dvae
from configs.scenes import dalle


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("emoji64", "debug"))
    config = dalle.get_config("debug" if argument == "debug" else "")
    config.data.transform = "dalle_training"
    config.data.bpe_dropout = 0.1
    config.optimizer.weight_decay = 0.1
    config.ema.decay = 0.998
    if argument != "debug":
        stage1 = dvae.get_config(argument)
        config.steps = 5500
        config.data.dataset = stage1.data.dataset
        config.data.text_length = config.models.dalle.text_length = 28
        config.frozen.dvae.update(stage1.models.dvae)
        config.frozen.dvae.source = "runs/drawings_dvae"
        config.models.dalle.image_vocab_size = stage1.models.dvae.vocab_size
        config.models.dalle.width = 192
        config.models.dalle.heads = 3
        config.checkpoint.every = config.evaluate.every = 1000
        config.evaluate.batches = 11
    return config
