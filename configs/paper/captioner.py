"""Captioners behind a prefix of CLIP's features as published: UniDiffuser's text decoder, and ClipCap's two mappers.

Paper: Bao et al. 2023, "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale", section 4 and
appendix, of captions; Mokady et al. 2021, "ClipCap: CLIP Prefix for Image Captioning", of pictures.

    python -m train --config=configs/paper/captioner.py --workdir=runs/text_decoder
    python -m train --config=configs/paper/captioner.py:clipcap --workdir=runs/clipcap
    python -m train --config=configs/paper/captioner.py:clipcap_transformer --workdir=runs/clipcap_transformer
    python -m evaluation --run=runs/clipcap

Arguments and parameters: `text` (default; a bottleneck of 64 numbers a token and GPT-2 with one more id; 124,539,712),
`clipcap` (a prefix of 10 by an MLP of 31,468,800, and GPT-2 trained with it, 124,439,808), `clipcap_transformer` (a
prefix of 40 by eight layers, GPT-2 left as it is), `debug` (seconds; on scenes).

pretrained/unidiffuser is the released pipeline and pretrained/gpt2 the released GPT-2, both converted
(docs/weights.md). Of the former `text` takes CLIP and both tokenizers; its own captioner is what this makes anew.
pretrained/clip_b32 is CLIP's ViT-B/32; GPT-2's tokenizer comes along with its weights. The captions are LAION's, the
pictures TFDS's `coco_captions`, both the user's to get. Hardware: ClipCap's paper says one GPU, and hours. No result of
this config was measured here.

UniDiffuser's authors did not publish how they trained theirs: `text` is trained as ClipCap. Networks are those of the
released files. ClipCap's hyper-parameters (AdamW, 2e-5 after 5000 updates of warm-up, batches of 40, ten epochs) are
from memory of its code and not checked against it. What differs, as far as known:

* The rate stays behind the warm-up; there it falls linearly to 0.
* A caption's loss is the mean over its tokens; there that of a batch is, without its pads.
* ClipCap's captions end with a full stop; here with GPT-2's end of text.
* Networks compute in bfloat16.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug
from configs.mesh_rules import CAPTIONER
from configs.paper import clip_vit

# argument -> (mapper, length of the prefix, ids of GPT-2, dataset, updates)
NETWORKS = {
    "text": ("bottleneck", 77, 50_258, "folder/laion_2b_en", 141_687),
    "clipcap": ("mlp", 10, 50_257, "coco_captions", 141_687),  # ten epochs of five captions of 113,287 pictures
    "clipcap_transformer": ("transformer", 40, 50_257, "coco_captions", 141_687),
    "debug": ("bottleneck", 24, 353, "", 4),
}


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, tuple(NETWORKS))
    mapper, prefix_length, vocab_size, dataset, steps = NETWORKS[argument]
    config = get_defaults()
    config.objective = "captioner"
    config.steps = steps
    config.batch_size = 40

    config.data.dataset = dataset
    if dataset == "coco_captions":
        config.data.split = "train+restval"  # the 113,287 pictures that papers train on; `train` alone has 82,783
        config.data.validation_split = "val"
    config.data.image_size = 224
    config.data.transform = "clip_evaluation"
    config.data.text_length = 77
    config.data.tokenizer = "pretrained/unidiffuser/tokenizer.json"
    config.data.writes_with = "pretrained/unidiffuser/caption_tokenizer.json"
    config.data.written_length = 67
    config.data["token_features" if mapper == "bottleneck" else "image_features"] = ""  # of scripts.precompute
    config.data.workers = 16

    if mapper == "bottleneck":
        config.frozen.clip = get_frozen_clip()
    else:
        config.frozen.clip = clip_vit.get_model(embed_dim=512, image_size=224, text_width=512)
        config.frozen.clip.update(image_tower="vit", image_width=768, image_layers=12, patch_size=32)
        config.frozen.clip.update(source="pretrained/clip_b32", part="clip", step=0)
        config.data.tokenizer = "pretrained/clip_b32/tokenizer.json"
        config.data.writes_with = "pretrained/gpt2/tokenizer.json"

    config.initialize.captioner = ConfigDict({"source": "", "part": "captioner"})  # a run to fine-tune from
    config.initialize.language = ConfigDict({"source": "pretrained/gpt2", "part": "gpt2", "at": "captioner/language"})
    config.models.captioner = get_model(mapper, prefix_length, vocab_size)
    if mapper == "transformer":
        config.trainable = ("^captioner/(?!language/)",)

    config.sample.temperature = 0.0
    config.sample.top_k = 0
    config.sample.top_p = 1.0
    config.sample.beams = 5
    config.sample.length_penalty = 1.0
    config.sample.caption_length = 67

    config.optimizer.weight_decay = 0.01
    config.optimizer.no_decay = r"(?!)"  # matches nothing: all parameters decay
    config.optimizer.schedule.name = "warmup_steps_down"  # constant behind the warm-up
    config.optimizer.schedule.peak = 2e-5
    config.optimizer.schedule.warmup_steps = 5000

    config.mesh.rules = CAPTIONER
    config.mesh.topology = "v5e:2x4"  # see docs/tpu.md

    config.checkpoint.every = 5000
    config.evaluate.every = 5000
    config.evaluate.previews = 16
    config.log.every = 100
    if argument == "debug":
        make_debug(config, steps=steps, batch_size=8)
        shrink_clip(config)
        _shrink(config.models.captioner, config.frozen.clip)
        config.data.writes_with = ""
        config.initialize.language.source = ""
        config.sample.beams = 2
        config.sample.caption_length = config.data.written_length = 24
    config.lock()
    return config


def get_model(mapper: str, prefix_length: int, vocab_size: int) -> ConfigDict:
    """GPT-2 small behind the prefix of a mapper; its last id ends captions."""
    model = ConfigDict()
    model.name = "captioner"
    model.text_vocab_size = vocab_size
    model.text_end_id = vocab_size - 1
    model.length = 1024
    model.width = 768
    model.depth = 12
    model.heads = 12
    model.mlp_hidden = 3072
    model.activation = "gelu_tanh"
    model.dropout = 0.1  # in training
    model.mapper = mapper
    model.prefix_length = prefix_length
    model.feature_width = 768 if mapper == "bottleneck" else 512
    model.latent_width = 64 if mapper == "bottleneck" else 0
    model.mapper_states = 40 if mapper == "transformer" else 0
    model.mapper_depth = 8 if mapper == "transformer" else 0
    model.mapper_heads = 8
    model.implementation = "auto"
    model.scan = True
    model.remat = "none"
    model.dtype = "bfloat16"
    return model


def get_frozen_captioner(source: str) -> ConfigDict:
    """The text decoder as `config.frozen.captioner`, of a run of this file or the released pipeline."""
    model = get_model("bottleneck", 77, 50_258)
    model.update(source=source, part="captioner", step=0)
    return model


def get_frozen_clip() -> ConfigDict:
    """UniDiffuser's two towers as `config.frozen.clip`: the pictures of ViT-B/32, the captions of ViT-L/14."""
    clip = clip_vit.get_model(embed_dim=512, image_size=224, text_width=768)
    clip.update(image_tower="vit", image_width=768, image_layers=12, patch_size=32)
    clip.update(source="pretrained/unidiffuser", part="clip", step=0)
    return clip


def shrink_clip(config: ConfigDict) -> None:
    """What debug variants change of CLIP and of captions."""
    config.data.tokenizer = ""
    config.data.text_ends = True
    config.data.text_length = config.frozen.clip.text_length = 24
    config.frozen.clip.update(image_size=32, patch_size=16, image_width=64, image_layers=1, embed_dim=32)
    config.frozen.clip.update(text_width=64, text_layers=1, text_vocab_size=353, text_end_id=352)
    config.frozen.clip.source = "random"


def _shrink(model: ConfigDict, clip: ConfigDict) -> None:
    """What debug variants change of a captioner with a bottleneck."""
    model.update(text_vocab_size=clip.text_vocab_size, text_end_id=clip.text_end_id, feature_width=clip.text_width)
    model.update(prefix_length=clip.text_length, length=64, width=32, depth=1, heads=2, mlp_hidden=48, latent_width=16)


def shrink_frozen(config: ConfigDict) -> None:
    """What debug variants change of a frozen CLIP and captioner."""
    shrink_clip(config)
    _shrink(config.frozen.captioner, config.frozen.clip)
    config.frozen.captioner.source = "random"
