"""Fine-tuning of a published Stable Diffusion on captioned pictures: low-rank pairs beside it, or all of its UNet.

Paper: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", of the projections of attention, as the
example scripts of the diffusers library have it for Stable Diffusion; Rombach et al. 2022 for what is tuned.

    python -m scripts.convert --source=diffusers --input=FOLDER --output=pretrained/sd15
    python -m scripts.prepare --dataset=folder --source=PICTURES --name=pictures --size=512
    python -m train --config=configs/paper/stable_diffusion_tuning.py --workdir=runs/sd15_lora
    python -m sample --run=runs/sd15_lora --prompt="..." --num=4 --out=grid.png

Arguments: `v1` (default; pairs of rank 4 beside the UNet of pretrained/sd15), `v1_text` (and beside the text tower),
`v1_full` (the whole UNet, with a moving average), `v2`, `v2_text`, `v2_full` (likewise, of pretrained/sd21, which
predicts v), `debug` (seconds; random networks).

Of rank 4 the pairs have 797,184 parameters beside the UNet of version 1 and 294,912 beside its text tower, of version 2
829,952 and 753,664. Rates are those of the scripts: 1e-4 for pairs and 1e-5 for all. Captions are left out of one
example in ten; `--config.process.weighting=min_snr` weighs steps as Hang et al. 2023. Hardware, time and quality: not
measured here.
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.paper import stable_diffusion

ARGUMENTS = ("v1", "v1_text", "v1_full", "v2", "v2_text", "v2_full", "debug")
# Fields of a UNet that a pipeline may have otherwise than the published ones, beside those that have a size here.
USUAL = {
    **{"out_channels": None, "transformer_depth": 1, "linear_projection": False, "num_classes": 0, "time_width": None},
    **{"sine_first": False, "last_period": False, "scale_shift": False, "downsample_padding": (1, 1), "dropout": 0.0},
    "norm_epsilon": 1e-5,
}


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ARGUMENTS)
    config = stable_diffusion.get_config("debug" if argument == "debug" else f"{argument[:2]}_512")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        _tune(config, argument)
    config.lock()
    return config


def _tune(config: ConfigDict, argument: str) -> None:
    version, _, trained = argument.partition("_")
    config.models.denoiser.update({**USUAL, **config.models.denoiser.to_dict()})
    config.process.weighting = "uniform"
    config.process.gamma = 5.0  # of the weighting min_snr
    config.loss.dropout = 0.1
    config.sample.update({"times": "published", "offset": 1, "end": "first"})  # as the published pipelines
    config.optimizer.schedule.peak = 1e-5 if trained == "full" else 1e-4
    config.ema.decay = 0.9999 if trained == "full" else 0.0
    config.lora.rank = 0 if trained == "full" else 4
    if argument == "debug":
        return
    config.data.dataset = "folder/pictures"
    config.data.workers = 2
    config.batch_size = 4
    config.steps = 2000
    config.optimizer.schedule.warmup_steps = 100
    config.mesh.fsdp = config.mesh.microbatches = 1
    config.mesh.topology = ""
    config.checkpoint.every = config.evaluate.every = 500
    config.evaluate.batches = 1
    config.evaluate.previews = 4
    config.log.every = 10
    source = "pretrained/sd15"
    if version == "v2":
        source = "pretrained/sd21"
        config.process.prediction = "v"
        config.data.image_size = 768
        config.models.denoiser.image_size = 96
    config.data.tokenizer = f"{source}/tokenizer.json"
    config.frozen.first_stage.source = config.frozen.text.source = config.initialize.denoiser.source = source
    config.frozen.first_stage.part = "first_stage"
    if trained == "text":
        config.models.text = ConfigDict(
            {k: v for k, v in config.frozen.text.items() if k not in ("source", "part", "step")}
        )
        config.models.text.text_heads = None  # width / 64
        del config.frozen.text
        config.initialize.text = ConfigDict({"source": source, "part": "text"})
