"""CLIP with a vision transformer as published: ViT-B/32, B/16, L/14, and L/14 at 336 pixels.

Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.5 and
tables 18 and 19.

    python -m train --config=configs/paper/clip_vit.py --workdir=runs/clip_b32 --config.data.dataset=... \
        --config.data.tokenizer=FILE
    python -m train --config=configs/paper/clip_vit.py:l14_336 --workdir=runs/clip_l14_336 \
        --config.initialize.clip.source=runs/clip_l14 ...

Hardware in the paper: 256 V100 GPUs for 12 days (L/14), 32 epochs of 400 million pairs in batches of 32,768. No result
of this config was measured here. The pairs were never released; the dataset is the user's. FILE is the published
vocabulary, `bpe_simple_vocab_16e6.txt.gz` or a transformers CLIP folder.

Arguments: `b32` (default; 151,277,313 parameters), `b16` (149,620,737), `l14` (427,616,513), `l14_336` (427,944,193:
one more epoch of L/14 at a higher resolution), `debug` (seconds; on scenes).
"""

import math

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug
from configs.mesh_rules import CLIP

PAIRS = 400_000_000
BATCH_SIZE = 32_768

# argument -> (image size, patch size, image width, image layers, text width, embedding, peak learning rate)
SIZES = {
    "b32": (224, 32, 768, 12, 512, 512, 5e-4),
    "b16": (224, 16, 768, 12, 512, 512, 5e-4),
    "l14": (224, 14, 1024, 24, 768, 768, 4e-4),
    "l14_336": (336, 14, 1024, 24, 768, 768, 2e-5),
    "debug": (32, 8, 64, 1, 64, 32, 1e-3),
}


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, tuple(SIZES))
    image_size, patch_size, image_width, image_layers, text_width, embed_dim, peak = SIZES[argument]
    config = get_training(image_size, peak, epochs=1 if argument == "l14_336" else 32)
    config.models.clip = get_model(embed_dim, image_size, text_width)
    config.models.clip.image_tower = "vit"
    config.models.clip.image_width = image_width
    config.models.clip.image_layers = image_layers
    config.models.clip.patch_size = patch_size
    config.models.clip.scan = True
    config.models.clip.remat = "full"
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-6
    if argument == "debug":
        shrink(config)
    config.lock()
    return config


def get_training(image_size: int, peak: float, epochs: int) -> ConfigDict:
    """What all of the published networks share but their shape and two constants of Adam."""
    config = get_defaults()
    config.objective = "clip"
    config.batch_size = BATCH_SIZE
    config.steps = epochs * PAIRS // BATCH_SIZE

    config.data.dataset = "conceptual_captions"
    config.data.image_size = image_size
    config.data.transform = "clip_training"
    config.data.text_length = 77
    config.data.tokenizer = "bpe_simple_vocab_16e6.txt.gz"
    config.data.workers = 16

    config.initialize.clip = ConfigDict({"source": "", "part": "clip"})  # what to fine-tune from
    config.loss.kind = "contrastive"

    config.optimizer.weight_decay = 0.2
    config.optimizer.no_decay = r"(bias|scale|class_embedding)$"
    config.optimizer.schedule.peak = peak
    config.optimizer.schedule.warmup_steps = 2000
    config.optimizer.bounds = ((r"logit_scale$", 0.0, math.log(100)),)

    config.mesh.rules = CLIP
    config.mesh.topology = "v5e:16x16"  # see docs/tpu.md

    config.checkpoint.every = 1000
    config.evaluate.every = 5000
    return config


def get_model(embed_dim: int, image_size: int, text_width: int) -> ConfigDict:
    """The text tower, and what both kinds of image tower have."""
    model = ConfigDict()
    model.name = "clip"
    model.embed_dim = embed_dim
    model.image_size = image_size
    model.text_vocab_size = 49_408
    model.text_length = 77
    model.text_end_id = 49_407
    model.text_width = text_width
    model.text_layers = 12
    model.text_heads = None  # width / 64, as image_heads
    model.image_heads = None
    model.image_mlp_ratio = 4.0
    model.activation = "quick_gelu"
    model.logit_scale_init = math.log(1 / 0.07)
    model.logit_bias_init = None  # the sigmoid loss starts from -10
    model.image_mean = (0.48145466, 0.4578275, 0.40821073)
    model.image_std = (0.26862954, 0.26130258, 0.27577711)
    model.implementation = "auto"
    model.scan = False
    model.remat = "none"
    model.dtype = "bfloat16"
    return model


def get_text_tower(source: str) -> ConfigDict:
    """The text tower of L/14 alone as `config.frozen.text`, 123,060,480 parameters, for diffusions that read captions.

    Captions are filled up with the end token, which the tokenizer must do, as Stable Diffusion 1's does.

    Args:
      source: a folder that holds it as part "text", such as a converted Stable Diffusion; "random" for tests.
    """
    tower = ConfigDict()
    tower.name = "clip_text"
    tower.text_vocab_size = 49_408
    tower.text_length = 77
    tower.text_end_id = 49_407
    tower.text_pad_id = 49_407
    tower.text_width = 768
    tower.text_layers = 12
    tower.activation = "quick_gelu"
    tower.scan = True
    tower.dtype = "bfloat16"
    tower.source = source
    tower.part = "text"
    tower.step = 0  # its newest checkpoint when a run begins
    return tower


def shrink_text_tower(config: ConfigDict) -> None:
    """What a debug variant changes of a config that reads captions with `get_text_tower`."""
    config.data.tokenizer = ""
    config.data.text_ends = True
    config.data.text_length = config.frozen.text.text_length = 24
    config.frozen.text.text_vocab_size = 353
    config.frozen.text.text_end_id = 352
    config.frozen.text.text_pad_id = 0
    config.frozen.text.text_width = 64
    config.frozen.text.text_layers = 1
    config.frozen.text.source = "random"


def shrink(config: ConfigDict) -> None:
    """Makes a debug variant: the embedded dataset, its tokenizer, one layer of text."""
    make_debug(config, steps=2, batch_size=8)
    config.data.tokenizer = ""
    config.data.text_ends = True
    config.data.text_length = config.models.clip.text_length = 24
    config.models.clip.text_vocab_size = 353
    config.models.clip.text_end_id = 352
    config.models.clip.text_layers = 1
