"""CLIP on `drawings`: what a drawing of an open emoji set is called.

Paper: Radford et al. 2021, section 2.

    python -m scripts.prepare --dataset=drawings/emoji64
    python -m train --config=configs/drawings/clip.py --workdir=runs/drawings_clip
    python -m evaluation --run=runs/drawings_clip --metrics=retrieval,similarity --splits=validation --num=1423
    python -m evaluation --run=runs/drawings_clip --metrics=retrieval,similarity --splits=held_out --num=612

Hardware and time: 21 minutes on one CPU core; docs/results.md has what it finds.

The dataset is small: 1,423 drawings, 12 pictures of each. So pictures are kept at 64 pixels and cut out of them a
little larger or smaller and off the center, captions are drawn from all that a picture has and are spelt in other
pieces each time (BPE dropout), weights decay more, and the average is long. Nothing is flipped: names say left and
right.

Arguments: `emoji64` (default; 64 pixels, seen at 32), `debug` (seconds; on scenes).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, muon_of
from configs.scenes import clip


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("emoji64", "debug"))
    config = clip.get_config("debug" if argument == "debug" else "vit")
    config.data.transform = "dalle_training"  # other crops of the same picture
    config.data.bpe_dropout = 0.1
    config.optimizer.weight_decay = 0.2
    config.optimizer.rules = muon_of(r"blocks_\d+/.*kernel$")
    config.ema.decay = 0.998
    if argument != "debug":
        config.steps = 3000
        config.data.dataset = "drawings/emoji64"
        config.data.text_length = config.models.clip.text_length = 32
        config.models.clip.text_vocab_size = 514  # what the dataset's tokenizer has, with both ends
        config.models.clip.text_end_id = 513
        config.models.clip.embed_dim = 128
        config.models.clip.image_width = config.models.clip.text_width = 128
        config.models.clip.image_layers = 4
        config.models.clip.text_layers = 3
        config.checkpoint.every = config.evaluate.every = 1000
        config.evaluate.batches = 11
    return config
