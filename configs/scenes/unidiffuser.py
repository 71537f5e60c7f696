"""UniDiffuser on `scenes`: a picture of a caption, a caption of a picture, both, or one alone, by one network.

Paper: Bao et al. 2023, "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale".

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/autoencoder.py --workdir=runs/autoencoder
    python -m train --config=configs/scenes/clip.py --workdir=runs/clip
    python -m train --config=configs/scenes/captioner.py --workdir=runs/captioner
    python -m train --config=configs/scenes/unidiffuser.py --workdir=runs/unidiffuser      (needs the three above)
    python -m sample --run=runs/unidiffuser --prompt="a small red circle"
    python -m sample --run=runs/unidiffuser --image=FILE
    python -m sample --run=runs/unidiffuser --num=8

First stage, CLIP and captioner are frozen. `config.scales` brings `power_clip` and `power_text`, which training logs,
near 1; where published latents were as CLIP and captioner have them (`--config.scales.clip=1 --config.scales.text=1`).

Hardware and time: one CPU core, 57 minutes, after which 97.5 % of captions are drawn right and every picture is
described right (docs/results.md); half the updates draw 77 %.

Arguments: `single32` (default), `debug` (seconds; needs no other run).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_process, make_debug, muon_of
from configs.mesh_rules import FIRST_STAGE, UNIDIFFUSER
from configs.scenes import autoencoder, captioner


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("single32", "debug"))
    debug = argument == "debug"
    words = captioner.get_config("debug" if debug else "text")
    stage = autoencoder.get_config("debug" if debug else "kl").models.autoencoder
    config = get_defaults()
    config.objective = "unidiffuser"
    config.steps = 16_000
    config.batch_size = 32

    for key in ("dataset", "image_size", "text_length", "text_ends", "cache"):
        config.data[key] = words.data[key]

    for key in ("latent_moments", "image_features", "caption_latents"):
        config.data[key] = ""  # "auto" or a folder: those that scripts.precompute stored
    config.data.data_type = -1  # kind of all examples, for a network that tells kinds apart; -1 for its last
    # The networks' own sizes replace these.
    config.frozen.first_stage = ConfigDict(stage.to_dict())
    config.frozen.first_stage.source = "runs/autoencoder"
    config.frozen.first_stage.part = "autoencoder"
    config.frozen.clip = ConfigDict(words.frozen.clip.to_dict())
    config.frozen.captioner = ConfigDict(words.models.captioner.to_dict())
    config.frozen.captioner.source = "runs/captioner"
    config.frozen.captioner.part = "captioner"

    config.initialize.unidiffuser = ConfigDict({"source": "", "part": "unidiffuser"})  # a run to fine-tune from
    config.models.unidiffuser = ConfigDict()
    config.models.unidiffuser.name = "unidiffuser"
    config.models.unidiffuser.image_size = 32 // (stage.patch_size * 2 ** (len(stage.multipliers) - 1))
    config.models.unidiffuser.patch_size = 1
    config.models.unidiffuser.width = 128
    config.models.unidiffuser.depth = 4
    config.models.unidiffuser.heads = 4
    config.models.unidiffuser.in_channels = stage.latent_channels
    config.models.unidiffuser.clip_width = config.frozen.clip.embed_dim
    config.models.unidiffuser.text_length = words.models.captioner.prefix_length
    config.models.unidiffuser.text_width = words.models.captioner.latent_width
    config.models.unidiffuser.data_types = 0
    config.models.unidiffuser.implementation = "auto"
    config.models.unidiffuser.scan = False
    config.models.unidiffuser.remat = "none"
    config.models.unidiffuser.dtype = "float32"

    chain = {"name": "discrete", "kind": "scaled_linear", "steps": 1000, "start": 8.5e-4, "end": 0.012}
    config.process = get_process(chain, latents=True)
    config.process.prediction = "x0"  # the paper's is eps, of uniform weights
    config.process.weighting = "clipped_snr"
    config.process.time_shift = 1

    # What latents are multiplied by: 0 for what is measured of so many examples before the first update.
    config.scales = ConfigDict({"clip": 0.0, "text": 0.0, "examples": 2048})

    config.loss.reduction = "elements"  # or "parts", the mean of each part by itself
    config.loss.image_weight = 1.0
    config.loss.clip_weight = 1.0
    config.loss.text_weight = 1.0

    config.sample.mode = ""  # a key of sample.samplers.unidiffuser_modes.MODES; "" for what is given
    config.sample.sampler = "dpm_solver_singlestep"
    config.sample.steps = 50
    config.sample.spacing = "time"
    config.sample.unconditional = "noise"  # what guidance of a picture leads away from; or "empty", the blank caption
    config.sample.noise = "authors"  # whose habits of drawing it; or "diffusers"
    config.sample.data_type = -1  # kind of data to draw; -1 for the one that was learned
    config.sample.guidance = 2.0
    for key in ("temperature", "top_k", "top_p", "beams", "length_penalty", "caption_length"):
        config.sample[key] = words.sample[key]

    hidden = r"(block|skip)\w*/.*kernel$"
    config.optimizer.rules = muon_of(hidden)
    config.optimizer.b2 = 0.99
    config.optimizer.clip_norm = 1.0
    config.optimizer.weight_decay = 0.03
    config.optimizer.schedule.peak = 1e-3
    config.optimizer.schedule.warmup_steps = 200
    config.ema.decay = 0.999

    config.mesh.rules = FIRST_STAGE + UNIDIFFUSER

    config.checkpoint.every = 1000
    config.evaluate.every = 2000
    config.evaluate.previews = 16
    config.log.every = 50
    if debug:
        make_debug(config, steps=4, batch_size=8)
        for entry in config.frozen.values():
            entry.source = "random"
        config.frozen.first_stage.multipliers, config.frozen.first_stage.patch_size = (1,), 4  # as many latents
        config.models.unidiffuser.width = 32
        config.models.unidiffuser.depth = 2
        config.models.unidiffuser.heads = 2
        config.sample.steps = 3
        config.scales.examples = 16
    config.lock()
    return config
