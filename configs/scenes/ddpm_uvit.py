"""Diffusion of pixels on `scenes` with a small U-ViT that reads captions.

Paper: Bao et al. 2023, "All are Worth Words: A ViT Backbone for Diffusion Models", with the process of Ho et al. 2020.
The network predicts x_0, whose error is weighed by the clipped signal-to-noise ratio (Salimans and Ho 2022, Hang et al.
2023), and the kernels of its blocks are trained by Muon. docs/results.md has the trials that led to both.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/ddpm_uvit.py --workdir=runs/ddpm_uvit

Hardware and time: 38 minutes on one CPU core, or 29 to 32 on two, after which half of the captions are right; the shape
is what is wrong with the others.

Captions are read by a small transformer that is trained with the denoiser. Positions are fixed sines of the same scale
as the patches' embeddings; at this size learned ones of deviation 0.02 take far longer to be of use.

Arguments: `single32` (default; one object), `pair32` (one or two objects with a relation), `clip` (one object, captions
read by a frozen CLIP; needs runs/clip), `debug` (seconds).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_diffusion_sampling, get_process, make_debug, muon_of
from configs.mesh_rules import UVIT
from configs.scenes import clip


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("single32", "pair32", "clip", "debug"))
    config = get_training(pairs=argument == "pair32")
    if argument == "clip":
        read_with_clip(config, clip.get_config())
    config.models.denoiser.name = "uvit"
    config.models.denoiser.patch_size = 4
    config.models.denoiser.width = 128
    config.models.denoiser.depth = 4
    config.models.denoiser.heads = 4
    config.models.denoiser.context_length = config.data.text_length
    config.models.denoiser.long_skip = "concat"
    config.models.denoiser.time = "token"
    config.models.denoiser.convolution = "image"
    config.models.denoiser.positions = "sincos_2d"
    config.mesh.rules = UVIT
    if argument == "debug":
        shrink(config)
        config.models.denoiser.width = 32
        config.models.denoiser.depth = 2
    config.lock()
    return config


def get_training(pairs: bool) -> ConfigDict:
    """What both backbones share: the data, captions, process, sampler and optimizer."""
    config = get_defaults()
    config.objective = "diffusion"
    config.steps = 6500
    config.batch_size = 32

    config.data.dataset = "scenes/pair32" if pairs else "scenes/single32"
    config.data.image_size = 32
    config.data.text_length = 20 if pairs else 12
    config.data.cache = True

    config.initialize.denoiser = ConfigDict({"source": "", "part": "denoiser"})  # a run to fine-tune from
    config.initialize.text = ConfigDict({"source": "", "part": "text"})  # likewise
    config.models.denoiser = ConfigDict()
    config.models.denoiser.image_size = 32
    config.models.denoiser.context_width = 128
    config.models.text = ConfigDict()
    config.models.text.name = "text_encoder"
    config.models.text.text_vocab_size = 392 if pairs else 351  # what the dataset's tokenizer has
    config.models.text.text_length = config.data.text_length
    config.models.text.width = 128
    config.models.text.layers = 2
    config.models.text.heads = 2

    config.process = get_process({"name": "discrete", "kind": "linear", "steps": 1000})
    config.process.prediction = "x0"
    config.process.weighting = "clipped_snr"
    config.process.clip = True

    config.loss.dropout = 0.1

    config.sample = get_diffusion_sampling("dpm_solver_multistep", steps=25, guidance=2.0)

    # Of the blocks, and of what joins or resamples them.
    hidden = r"(block|skip|residual|attention|resample)\w*/.*kernel$"
    config.optimizer.rules = muon_of(hidden)
    config.optimizer.b2 = 0.99
    config.optimizer.clip_norm = 1.0
    config.optimizer.weight_decay = 0.03
    config.optimizer.schedule.peak = 2e-3
    config.optimizer.schedule.warmup_steps = 200
    config.ema.decay = 0.999

    config.checkpoint.every = 1000
    config.checkpoint.keep = 20
    config.evaluate.every = 2000
    config.evaluate.previews = 16
    config.log.every = 50
    return config


def read_with_clip(config: ConfigDict, stage: ConfigDict) -> None:
    """A frozen CLIP, trained by the config `stage`, reads captions in place of a network trained with the denoiser."""
    del config.models.text
    del config.initialize.text
    config.data.text_length = stage.data.text_length
    config.data.text_ends = True
    config.data.text_features = ""  # "auto" or a folder: those that scripts.precompute stored
    config.models.denoiser.context_width = stage.models.clip.text_width
    config.frozen.clip = ConfigDict(stage.models.clip.to_dict())  # the run's own sizes replace these
    config.frozen.clip.source = "runs/clip"
    config.frozen.clip.part = "clip"
    config.frozen.clip.step = 0  # its newest checkpoint when this run begins


def shrink(config: ConfigDict) -> None:
    """What the debug variants of both backbones change."""
    make_debug(config, steps=4, batch_size=8)
    config.models.text.width = config.models.denoiser.context_width = 32
    config.models.text.layers = 1
    config.sample.steps = 3
