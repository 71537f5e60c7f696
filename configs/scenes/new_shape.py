"""Fine-tuning of a trained latent diffusion to a shape that it never saw, of 20 pictures.

Paper: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models".

    python -m scripts.prepare --dataset=scenes/heart32
    python -m train --config=configs/scenes/new_shape.py --workdir=runs/heart_lora
    python -m evaluation --run=runs/heart_lora --metrics=caption_accuracy

The run that is tuned is runs/latent_uvit, of `configs/scenes/latent_uvit.py`; the split `validation` shows hearts, and
`held_out` the shapes and colors of `single32`, so that the evaluation says what was learned and what was forgotten: 25
pairs that the run was trained on, and the 5 that `single32` holds out. Captions are read with the run's own tokenizer,
to which a heart is five pieces: three wordings of the five that name all are longer than its 12, and one of them then
lacks the background.

Arguments: `lora` (default; pairs of rank 4 beside attention and feed-forward layers of the denoiser and of the text
encoder), `full` (all of both), `debug` (seconds; random networks).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.scenes import latent_uvit

ARGUMENTS = ("lora", "full", "debug")
SOURCE = "runs/latent_uvit"


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ARGUMENTS)
    config = latent_uvit.get_config("debug" if argument == "debug" else "").copy_and_resolve_references()
    with config.unlocked():
        config.lora.rank = 0 if argument == "full" else 4
        config.lora.paths = (r"(attention|mlp)/.*kernel$",)
        config.optimizer.rules = ({"pattern": ".*"},)
        config.optimizer.weight_decay = 0.0
        config.optimizer.schedule.name = "constant"
        config.optimizer.schedule.decay_steps = 0
        config.optimizer.schedule.peak = 3e-4 if argument == "full" else 2e-3
        config.ema.decay = 0.0
        config.ema.warm_up = True
        if argument != "debug":
            config.data.dataset = "scenes/heart32"
            config.data.tokenizer = f"{SOURCE}/tokenizer.json"
            config.initialize.denoiser.source = config.initialize.text.source = SOURCE
            config.steps = 500
            config.batch_size = 20
            config.optimizer.schedule.warmup_steps = 20
            config.checkpoint.every = config.evaluate.every = 500
            config.evaluate.previews = 8
    config.lock()
    return config
