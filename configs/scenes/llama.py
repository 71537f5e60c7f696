"""A small language model on the texts of `scenes`: questions about pictures with their answers, and nothing to see.

Paper: Dubey et al. 2024, "The Llama 3 Herd of Models", section 3.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/llama.py --workdir=runs/llama
    python -m sample --run=runs/llama --prompt="how many shapes are there?"

It learns the words, and to answer from a caption that stands before most of the questions; without one it can only
guess, until configs/scenes/vision_adapter.py lets it look. The questions are those of `data.scenes.questions`: which
shape, which color, how many, where, yes or no, and describe it. Texts are of scenes of all pairs of shape and color,
also of those whose pictures nothing is ever trained on: it sees no pictures.

Hardware and time: one CPU core, 3 minutes.

Arguments: `single32` (default), `pair32`, `debug` (seconds).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, make_debug, muon_of
from configs.mesh_rules import LLAMA


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("single32", "pair32", "debug"))
    single = argument != "pair32"
    config = get_defaults()
    config.objective = "llama"
    config.steps = 2000
    config.batch_size = 64

    config.data.dataset = "scenes/single32" if single else "scenes/pair32"
    config.data.image_size = 32
    config.data.text_length = 40 if single else 56  # start, caption, question, end, answer, end
    config.data.text_ends = True
    config.data.dialogues = "scenes_in_words"
    config.data.cache = True

    config.initialize.llama = ConfigDict({"source": "", "part": "llama"})  # a run to fine-tune from
    config.models.llama = ConfigDict()
    config.models.llama.name = "llama"
    config.models.llama.text_vocab_size = 353 if single else 394  # what the dataset's tokenizer has, with both ends
    config.models.llama.text_end_id = config.models.llama.text_vocab_size - 1
    config.models.llama.width = 96
    config.models.llama.depth = 4
    config.models.llama.heads = 4
    config.models.llama.kv_heads = 2
    config.models.llama.mlp_hidden = 256
    config.models.llama.head_dim = 24
    config.models.llama.rope_theta = 10000.0
    config.models.llama.rope_factor = 1.0
    config.models.llama.tied = False
    config.models.llama.implementation = "auto"
    config.models.llama.scan = False
    config.models.llama.remat = "none"
    config.models.llama.dtype = "float32"

    config.loss.pack = 1  # texts in a row of tokens, which must divide what a device has of a batch
    config.loss.packed_length = 0  # tokens of such a row, beyond which it is cut; 0 for as many as its texts may have
    config.loss.answer_weight = 1.0  # of the loss of the answers alone, which is added to that of all tokens

    config.sample.temperature = 0.0
    config.sample.top_k = 0
    config.sample.top_p = 1.0
    config.sample.answer_length = 16 if single else 24

    config.optimizer.rules = muon_of(r"blocks_\d+/.*kernel$")
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.peak = 2e-3
    config.optimizer.schedule.warmup_steps = 100

    config.mesh.rules = LLAMA

    config.checkpoint.every = 500
    config.evaluate.every = 500
    config.log.every = 20
    if argument == "debug":
        make_debug(config, steps=4, batch_size=8)
        shrink(config.models.llama)
    config.lock()
    return config


def shrink(model: ConfigDict) -> None:
    """The language model of the `debug` variants."""
    model.width, model.depth, model.heads, model.kv_heads, model.head_dim, model.mlp_hidden = 32, 2, 4, 2, 8, 48
