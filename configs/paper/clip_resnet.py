"""CLIP with a modified ResNet as published: RN50, RN101, RN50x4, RN50x16, RN50x64.

Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.5 and
tables 18 and 19.

    python -m train --config=configs/paper/clip_resnet.py --workdir=runs/clip_rn50 --config.data.dataset=... \
        --config.data.tokenizer=FILE

Hardware in the paper: 592 V100 GPUs for 18 days (RN50x64), 32 epochs of 400 million pairs in batches of 32,768. No
result of this config was measured here. Dataset and FILE as in `clip_vit.py`. Statistics of batch normalization are of
the whole batch here, over all devices.

Arguments: `rn50` (default; 102,007,137 parameters), `rn101` (119,688,033), `rn50x4` (178,300,601), `rn50x16`
(290,979,217), `rn50x64` (623,258,305), `debug` (seconds; on scenes).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.paper.clip_vit import get_model, get_training, shrink

# argument -> (image size, width, bottlenecks of each stage, text width, embedding, peak learning rate)
SIZES = {
    "rn50": (224, 64, (3, 4, 6, 3), 512, 1024, 5e-4),
    "rn101": (224, 64, (3, 4, 23, 3), 512, 512, 5e-4),
    "rn50x4": (288, 80, (4, 6, 10, 6), 640, 640, 5e-4),
    "rn50x16": (384, 96, (6, 8, 18, 8), 768, 768, 4e-4),
    "rn50x64": (448, 128, (3, 15, 36, 10), 1024, 1024, 3.6e-4),
    "debug": (32, 8, (1, 1), 64, 32, 1e-3),
}


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, tuple(SIZES))
    image_size, image_width, image_layers, text_width, embed_dim, peak = SIZES[argument]
    config = get_training(image_size, peak, epochs=32)
    config.models.clip = get_model(embed_dim, image_size, text_width)
    config.models.clip.image_tower = "resnet"
    config.models.clip.image_width = image_width
    config.models.clip.image_layers = image_layers
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    if argument == "debug":
        shrink(config)
    config.lock()
    return config
