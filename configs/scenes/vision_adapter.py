"""The language model of configs/scenes/llama.py learns to look at the pictures of `scenes`; itself it does not change.

Paper: Dubey et al. 2024, "The Llama 3 Herd of Models", section 7. The image encoder starts from nothing here.

    python -m train --config=configs/scenes/vision_adapter.py --workdir=runs/vision_adapter      (needs runs/llama)
    python -m sample --run=runs/vision_adapter --image=FILE --prompt="which color is the circle?"

Trained are encoder, projection, cross-attention layers and the embedding of the picture's token
(`config.trainable`); gates start at 0, so that the first step answers as the language model does.

Hardware and time: one CPU core, 34 minutes, after which 99.8 % and more of each kind of question are answered right,
and 93.6 % and more about pairs of color and shape that training held out (docs/results.md).

Two other ways to the same end, of the same encoder, objective and number of updates (docs/vision_adapter.md):

    python -m train --config=configs/scenes/vision_adapter.py:full --workdir=runs/vision_full
    python -m train --config=configs/scenes/vision_adapter.py:prefix --workdir=runs/vision_prefix

`full` trains the language model too. In `prefix` it stays as it is, and reads vectors that a mapper makes of the
picture (Mokady et al. 2021, "ClipCap", section 3.2).

Arguments: `single32` (default), `pair32`, `full`, `prefix`, `debug` (seconds; needs no other run), `debug_full` and
`debug_prefix` (the same).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug, muon_of
from configs.mesh_rules import LLAMA
from configs.scenes import llama


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    known = ("single32", "pair32", "full", "prefix", "debug", "debug_full", "debug_prefix")
    argument = check_argument(argument, known)
    debug = argument.startswith("debug")
    language = llama.get_config("debug" if debug else "pair32" if argument == "pair32" else "")
    config = get_defaults()
    config.objective = "vision_adapter"
    config.steps = 10_000
    config.batch_size = 64

    for key in ("dataset", "image_size", "text_ends", "cache"):
        config.data[key] = language.data[key]
    config.data.text_length = 36 if argument == "pair32" else 28  # start, question, end, answer, end
    config.data.dialogues = "scenes"

    # The language model within: a run of configs/scenes/llama.py.
    config.initialize.language = ConfigDict({"source": "runs/llama", "part": "llama", "at": "vision_adapter/language"})
    # The image encoder may start from the tower of a CLIP of its sizes: a run of configs/scenes/clip.py:vit with
    # --config.models.clip.image_mlp_ratio=3.
    config.initialize.encoder = ConfigDict({"source": "", "part": "clip", "at": "vision_adapter/encoder"})
    config.initialize.vision_adapter = ConfigDict({"source": "", "part": "vision_adapter"})  # or a whole one
    config.trainable = (".*",) if argument.endswith("full") else (r"^vision_adapter/(?!language/)",)

    config.models.vision_adapter = ConfigDict(language.models.llama.to_dict())
    model = config.models.vision_adapter
    if argument.endswith("prefix"):
        model.name = "vision_prefix"
        model.prefix_length = 10
        model.mapper_layers = 2
        model.mapper_heads = 4
        model.mapper_hidden = 336
    else:
        model.name = "vision_adapter"
        model.cross_layers = (0, 2)
    model.image_token = model.text_vocab_size  # the first of the extra ones
    model.extra_tokens = 1
    model.tile_size = config.data.image_size
    model.patch_size = 4
    model.image_width = 96
    model.image_heads = 2
    model.image_layers = 3
    model.global_layers = 1
    model.image_mlp_ratio = 3
    model.max_tiles = config.data.max_tiles
    model.feature_layers = (1, 2)
    model.tile_tables = "grid"

    config.loss.pack = 1  # texts in a row of tokens, which must divide what a device has of a batch
    config.loss.packed_length = 0  # tokens of such a row, beyond which it is cut; 0 for as many as its texts may have

    for key, value in language.sample.items():
        config.sample[key] = value

    config.optimizer.rules = muon_of(r"blocks_\d+/.*kernel$")
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.no_decay = r"(bias|scale|embedding|gate|grid)$"
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.peak = 1e-3
    config.optimizer.schedule.warmup_steps = 200
    config.ema.decay = 0.99

    config.mesh.rules = LLAMA

    config.checkpoint.every = 500
    config.evaluate.every = 500
    config.log.every = 20
    if debug:
        make_debug(config, steps=4, batch_size=8)
        llama.shrink(model)
        if argument.endswith("prefix"):
            model.prefix_length, model.mapper_layers, model.mapper_hidden = 2, 1, 48
        else:
            model.cross_layers = (1,)
        model.image_width, model.image_layers, model.feature_layers = 32, 2, (1,)
        config.initialize.language.source = "random"
    config.lock()
    return config
