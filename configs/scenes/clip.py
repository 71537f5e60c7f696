"""CLIP on `scenes`: a small convolutional tower, or a small ViT, and a small text transformer.

Paper: Radford et al. 2021, section 2.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/clip.py --workdir=runs/clip

Hardware and time: 2 CPU cores, 7 minutes. Expect every shape and color named right, on validation and on held-out
combinations (`python -m evaluation --run=runs/clip`); of `pair32`, of single objects, 96 % of shapes and 100 % of
colors on validation, 85 % and 99 % held out.

Arguments: `single32` (default; one object), `pair32` (one or two objects with a relation), `vit` (a ViT in place of
the ResNet; slower to learn shapes), `sigmoid` (SigLIP's loss), `debug` (seconds; a ViT).
"""

import math

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug
from configs.mesh_rules import CLIP


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("single32", "pair32", "vit", "sigmoid", "debug"))
    single = argument != "pair32"
    config = get_defaults()
    config.objective = "clip"
    config.steps = 2500
    config.batch_size = 128

    config.data.dataset = "scenes/single32" if single else "scenes/pair32"
    config.data.image_size = 32
    config.data.text_length = 24  # start, caption, end
    config.data.text_ends = True
    config.data.cache = True

    config.initialize.clip = ConfigDict({"source": "", "part": "clip"})  # a run to fine-tune from
    config.models.clip = ConfigDict()
    config.models.clip.name = "clip"
    config.models.clip.embed_dim = 64
    config.models.clip.image_size = 32
    if argument in ("vit", "debug"):
        config.models.clip.image_tower = "vit"
        config.models.clip.image_width = 96
        config.models.clip.image_layers = 3
        config.models.clip.image_heads = 2
        config.models.clip.image_mlp_ratio = 4  # 3 for an image encoder of configs/scenes/vision_adapter.py
        config.models.clip.patch_size = 4
    else:
        config.models.clip.image_tower = "resnet"
        config.models.clip.image_width = 32
        config.models.clip.image_layers = (1, 1, 1)
    config.models.clip.text_vocab_size = 353 if single else 394  # what the dataset's tokenizer has, with both ends
    config.models.clip.text_length = config.data.text_length
    config.models.clip.text_end_id = config.models.clip.text_vocab_size - 1
    config.models.clip.text_width = 96
    config.models.clip.text_layers = 2
    config.models.clip.text_heads = 2
    config.models.clip.activation = "quick_gelu"
    config.models.clip.logit_scale_init = math.log(1 / 0.07)
    config.models.clip.implementation = "auto"
    config.models.clip.scan = False
    config.models.clip.remat = "none"
    config.models.clip.dtype = "float32"

    config.models.clip.logit_bias_init = None
    config.loss.kind = "contrastive"
    if argument == "sigmoid":
        config.loss.kind = "sigmoid"
        config.models.clip.logit_scale_init = math.log(10)
        config.models.clip.logit_bias_init = -10.0

    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-6
    config.optimizer.weight_decay = 0.1
    config.optimizer.no_decay = r"(bias|scale|class_embedding)$"
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.peak = 2e-3
    config.optimizer.schedule.warmup_steps = 200
    config.optimizer.bounds = ((r"logit_scale$", 0.0, math.log(100)),)
    config.ema.decay = 0.99

    config.mesh.rules = CLIP

    config.checkpoint.every = 500
    config.evaluate.every = 500
    config.log.every = 20
    if argument == "debug":
        make_debug(config, steps=4, batch_size=8)
        config.models.clip.image_width = config.models.clip.text_width = 32
        config.models.clip.image_layers = config.models.clip.text_layers = 1
    config.lock()
    return config
