"""The vision adapter of Llama 3.2 as published: a frozen language model of 8 or 70 billion parameters learns to look.

Paper: Dubey et al. 2024, "The Llama 3 Herd of Models", section 7; sizes are those of the published weights.

    python -m scripts.convert --source=transformers --input=FOLDER --output=pretrained/llama31_8b
    python -m train --config=configs/paper/vision_adapter.py --workdir=runs/vision_adapter_11b --config.data.dataset=...
    python -m train --config=configs/paper/vision_adapter.py:11b_answers --workdir=runs/vision_adapter_11b_answers \
        --config.data.dataset=...

Arguments: `11b` (default) and `90b`, the first stage, which learns captions; `11b_answers` and `90b_answers`, the
second one, which begins with what the first one left and learns to answer questions; `debug` (seconds; on scenes).

Parameters: 10,670,220,835 and 88,593,355,323, of which 8,030,261,248 and 70,553,706,496 are the language model's and
stay as they are (Llama 3.1, converted to pretrained/). Encoder, projection, cross-attention and the embeddings of new
tokens are trained.

The paper trains the adapter on 6 billion pairs in batches of 16,384, pictures in at most four tiles. The rest is not
checked against it: a peak of 1e-3 that falls by a cosine, a decay of 0.01, and everything of the second stage but its
kind of data. No result of this config was measured here. What differs, as far as known:

* Tiles have the 560 pixels of the published instruction-tuned weights from the beginning; the paper's are smaller
  before they are enlarged.
* Questions: the tokenizer of Llama 3.1 has no token of a picture, so that the picture's stands before the start of the
  text and not in the user's turn. With Llama 3.2 Vision's, as config.data.tokenizer, it stands there.
* The encoder starts from nothing, and the paper's from a CLIP of its own, which was not published.

A text is a caption, or question and answer with a tab between both (docs/vision_adapter.md).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug
from configs.mesh_rules import LLAMA
from configs.scenes import llama

# name -> (width, layers, heads, width within feed-forward blocks, the language model within, fsdp)
SIZES = {
    "11b": (4096, 32, 32, 14_336, "pretrained/llama31_8b", 64),
    "90b": (8192, 80, 64, 28_672, "pretrained/llama31_70b", 256),
}
_VOCABULARY = 128_256


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("11b", "90b", "11b_answers", "90b_answers", "debug"))
    size, _, answers = argument.partition("_")
    width, depth, heads, mlp_hidden, language, fsdp = SIZES.get(size, SIZES["11b"])
    config = get_defaults()
    config.objective = "vision_adapter"
    config.steps = 10_000 if answers else 366_000  # or 6 billion pairs
    config.batch_size = 512 if answers else 16_384

    config.data.dataset = "folder/questions" if answers else "folder/captions"
    config.data.image_size = 560  # of a tile
    config.data.max_tiles = 4
    config.data.text_length = 512 if answers else 128
    config.data.dialogues = "tabs" if answers else "captions"
    config.data.tokenizer = f"{language}/tokenizer.json"
    config.data.text_ends = bool(answers)  # questions and answers are turns of a conversation
    config.data.workers = 16

    first = f"runs/vision_adapter_{size}"
    config.initialize.language = ConfigDict({"part": "llama", "at": "vision_adapter/language"})
    config.initialize.language.source = "" if answers else language
    # The image encoder's first layers may start from the tower of a CLIP of its sizes: OpenCLIP's ViT-H/14, converted.
    config.initialize.encoder = ConfigDict({"source": "", "part": "clip", "at": "vision_adapter/encoder"})
    config.initialize.vision_adapter = ConfigDict({"source": first if answers else "", "part": "vision_adapter"})
    config.trainable = (r"^vision_adapter/(?!language/)",)

    config.models.vision_adapter = ConfigDict()
    model = config.models.vision_adapter
    model.name = "vision_adapter"
    model.text_vocab_size = _VOCABULARY
    model.text_end_id = 128_009 if answers else 128_001  # of a turn, of a text
    model.text_stop_ids = (128_001, 128_008) if answers else (128_008, 128_009)
    model.text_pad_id = 128_004
    model.width = width
    model.depth = depth
    model.heads = heads
    model.kv_heads = 8
    model.head_dim = 128
    model.mlp_hidden = mlp_hidden
    model.rope_theta = 500_000.0
    model.rope_factor = 8.0
    model.tied = False
    model.cross_layers = tuple(range(3, depth, 4))
    model.image_token = _VOCABULARY
    model.extra_tokens = 8
    model.tile_size = config.data.image_size
    model.patch_size = 14
    model.image_width = 1280
    model.image_heads = 16
    model.image_layers = 32
    model.global_layers = 8
    model.image_mlp_ratio = 4
    model.max_tiles = config.data.max_tiles
    model.feature_layers = (3, 7, 15, 23, 30)
    model.tile_tables = "canvases"
    model.implementation = "auto"
    model.scan = True
    model.remat = "full"
    model.dtype = "bfloat16"

    config.loss.pack = 1  # texts in a row of tokens, which must divide what a device has of a batch
    config.loss.packed_length = 0  # tokens of such a row, beyond which it is cut; 0 for as many as its texts may have

    config.sample.temperature = 0.0
    config.sample.top_k = 0
    config.sample.top_p = 1.0
    config.sample.answer_length = 256

    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.01
    config.optimizer.no_decay = r"(bias|scale|embedding|gate|grid)$"
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.peak = 2e-5 if answers else 1e-3
    config.optimizer.schedule.warmup_steps = 200 if answers else 2000

    config.mesh.fsdp = fsdp
    config.mesh.microbatches = config.batch_size // 256  # one example on a device at a time
    config.mesh.rules = LLAMA
    config.mesh.topology = "v5e:16x16"  # see docs/tpu.md

    config.checkpoint.every = 1000
    config.evaluate.every = 5000
    if argument == "debug":
        make_debug(config, steps=2, batch_size=4)
        config.mesh.microbatches = 1
        small = llama.get_config("debug")
        for key in ("text_length", "text_ends", "dialogues"):
            config.data[key] = small.data[key]
        config.data.tokenizer = ""
        config.initialize.language.source = "random"
        for key in ("text_vocab_size", "text_end_id"):
            model[key] = small.models.llama[key]
        model.text_stop_ids, model.text_pad_id = (), 0
        llama.shrink(model)
        model.image_token = model.text_vocab_size
        model.cross_layers = (1,)
        config.data.image_size = 16  # a picture of 32 pixels is four tiles
        model.tile_size, model.patch_size = config.data.image_size, 8
        model.image_width, model.image_heads = 16, 2
        model.image_layers, model.global_layers, model.feature_layers = 2, 1, (1,)
        model.scan, model.remat = False, "none"
        config.sample.answer_length = 4
    config.lock()
    return config
