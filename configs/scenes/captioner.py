"""Captions on `scenes`, by a small GPT-2 behind a prefix of a frozen CLIP's features.

Paper: Mokady et al. 2021, "ClipCap: CLIP Prefix for Image Captioning", of pictures; Bao et al. 2023, "One Transformer
Fits All Distributions in Multi-Modal Diffusion at Scale", appendix, of captions.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/clip.py --workdir=runs/clip
    python -m train --config=configs/scenes/captioner.py --workdir=runs/captioner      (needs runs/clip)
    python -m train --config=configs/scenes/captioner.py:mlp --workdir=runs/captioner_mlp
    python -m sample --run=runs/captioner_mlp --image=FILE

`text` (default) reads CLIP's features of each token of a caption through a bottleneck of 16 numbers a token and says
the caption again: UniDiffuser diffuses what the bottleneck makes, and this network reads what it draws. `mlp` and
`transformer` read the embedding of a picture. All of GPT-2 is trained; one that has learned to write, such as another
captioner's, stays as it is and the mapper alone learns with

    python -m train --config=configs/scenes/captioner.py --workdir=runs/captioner_frozen \
        --config.trainable='("^captioner/(?!language/)",)' \
        --config.initialize.language.source=runs/captioner --config.initialize.language.part=captioner/language

Hardware and time: `text` and `mlp`, one CPU core, 3 minutes each, after which every caption of 500 is said again, and
every picture of 500 described, without fault (docs/results.md); so with `transformer`, in 6 of a shared core.

Arguments: `text` (default), `mlp`, `transformer`, `debug` (seconds; needs no other run), `debug_mlp` (the same).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug
from configs.mesh_rules import CAPTIONER
from configs.scenes import clip


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("text", "mlp", "transformer", "debug", "debug_mlp"))
    features = clip.get_config("debug" if argument.startswith("debug") else "")
    config = get_defaults()
    config.objective = "captioner"
    config.steps = 1000
    config.batch_size = 64

    for key in ("dataset", "image_size", "text_length", "text_ends", "cache"):
        config.data[key] = features.data[key]
    config.data.writes_with = ""  # the tokenizer.json of a captioner with another vocabulary than CLIP's
    config.data.written_length = 0  # its tokens of a caption

    # What the captioner reads: "auto" or a folder, of what scripts.precompute stored.
    config.data["token_features" if argument in ("text", "debug") else "image_features"] = ""
    # Network and weights of the first stage: a run of configs/scenes/clip.py.
    config.frozen.clip = ConfigDict(features.models.clip.to_dict())
    config.frozen.clip.source = "runs/clip"
    config.frozen.clip.part = "clip"
    config.frozen.clip.step = 0  # its newest checkpoint when this run begins

    config.initialize.captioner = ConfigDict({"source": "", "part": "captioner"})  # a run to fine-tune from
    config.initialize.language = ConfigDict({"source": "", "part": "gpt2", "at": "captioner/language"})  # or its GPT-2
    config.models.captioner = ConfigDict()
    model = config.models.captioner
    model.name = "captioner"
    model.text_vocab_size = features.models.clip.text_vocab_size
    model.text_end_id = features.models.clip.text_end_id
    model.length = 64
    model.width = 96
    model.depth = 3
    model.heads = 4
    model.mlp_hidden = 384
    model.activation = "gelu_tanh"
    model.dropout = 0.0
    if argument in ("text", "debug"):
        model.mapper = "bottleneck"
        model.feature_width = features.models.clip.text_width
        model.prefix_length = features.models.clip.text_length
        model.latent_width = 16
    else:
        model.mapper = "transformer" if argument == "transformer" else "mlp"
        model.feature_width = features.models.clip.embed_dim
        model.prefix_length = 8
        model.latent_width = 0
        model.mapper_states = 8 if argument == "transformer" else 0
        model.mapper_depth = 2 if argument == "transformer" else 0
        model.mapper_heads = 4
    model.implementation = "auto"
    model.scan = False
    model.remat = "none"
    model.dtype = "float32"

    config.sample.temperature = 0.0
    config.sample.top_k = 0
    config.sample.top_p = 1.0
    config.sample.beams = 0
    config.sample.length_penalty = 1.0
    config.sample.caption_length = features.data.text_length

    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.no_decay = r"(bias|scale|embedding|mapper_prefix)$"
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.peak = 1e-3
    config.optimizer.schedule.warmup_steps = 100
    config.ema.decay = 0.99

    config.mesh.rules = CAPTIONER

    config.checkpoint.every = 500
    config.evaluate.every = 500
    config.log.every = 20
    if argument.startswith("debug"):
        make_debug(config, steps=4, batch_size=8)
        model.width, model.depth, model.heads, model.mlp_hidden = 32, 1, 2, 48
        config.frozen.clip.source = "random"
    config.lock()
    return config
