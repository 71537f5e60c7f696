"""Stable Diffusion as published: a UNet that reads a frozen CLIP's states of a caption, versions 1 and 2.

Paper: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; the model cards of CompVis
(version 1) and Stability AI (version 2) have what is trained here.

    python -m train --config=configs/paper/stable_diffusion.py --workdir=runs/sd1_256 --config.data.dataset=...
    python -m train --config=configs/paper/stable_diffusion.py:v1_512 --workdir=runs/sd1_512 --config.data.dataset=...
    python -m train --config=configs/paper/stable_diffusion.py:v1_4 --workdir=runs/sd1_4 --config.data.dataset=...

Arguments, each a part of the training that begins with what the one before it left, its updates and data in the cards:
`v1_256` (default; 237,000; laion2B-en), `v1_512` (194,000; laion-high-resolution; with it sd-v1-1), `v1_2` (515,000;
laion-aesthetics v2 5+), `v1_4` (225,000; the same; one caption in ten is left out), `v2_256` (550,000; LAION-5B without
what a filter took out), `v2_512` (850,000; the same, pictures of 512 and more), `debug` (seconds; on scenes).

Parameters: 859,520,964 of version 1 and 865,910,724 of version 2, and frozen ones: 83,653,863 of kl_f8, and the text
tower of CLIP L/14 with 123,060,480, or that of OpenCLIP's H/14 without its last layer, 340,387,840.

Hardware in the cards: 256 A100, 150,000 hours of them for version 1. They show no FID as a figure. No result of this
config was measured here. LAION's pictures are the user's to get (docs/own_data.md); docs/latent_diffusion.md says how
the frozen parts get to pretrained/.

Of the cards: AdamW, batches of 2048, 10,000 updates of warm-up to 1e-4, constant then. Of the code that they name
(github.com/CompVis/stable-diffusion): networks, schedule, factor of the latents, AdamW's usual decay of 0.01 of all
parameters, the moving average, 50 steps of PLMS. The configs of training itself were not released. What differs, as far
as known:

* The warm-up begins at 0, there at 1e-10.
* Networks compute in bfloat16; captions are left out of v2 as often as of v1_4, which is a guess.
* Pictures are cut at random where they are longer than wide; how theirs were cut is not known.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_diffusion_sampling, get_process, make_debug
from configs.mesh_rules import FIRST_STAGE, UNET
from configs.paper import clip_vit, first_stage

# argument -> (side of a picture, updates, captions left out, dataset, what it begins with)
PARTS = {
    "v1_256": (256, 237_000, 0.0, "folder/laion_2b_en", ""),
    "v1_512": (512, 194_000, 0.0, "folder/laion_high_resolution", "runs/sd1_256"),
    "v1_2": (512, 515_000, 0.0, "folder/laion_aesthetics", "runs/sd1_512"),
    "v1_4": (512, 225_000, 0.1, "folder/laion_aesthetics", "runs/sd1_2"),
    "v2_256": (256, 550_000, 0.1, "folder/laion_5b", ""),
    "v2_512": (512, 850_000, 0.1, "folder/laion_5b", "runs/sd2_256"),
    "debug": (32, 4, 0.1, "", ""),
}


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, tuple(PARTS))
    image_size, steps, dropout, dataset, start = PARTS[argument]
    config = get_defaults()
    config.objective = "diffusion"
    config.steps = steps
    config.batch_size = 2048

    config.data.dataset = dataset
    config.data.image_size = image_size
    config.data.transform = "random_crop"
    config.data.text_length = 77
    config.data.tokenizer = f"pretrained/{'sd2' if argument.startswith('v2') else 'sd1'}/tokenizer.json"
    config.data.workers = 16

    stage = first_stage.get_frozen("debug" if argument == "debug" else "kl_f8", "pretrained/sd_vae", 0.18215)
    config.data.latent_moments = ""  # "auto" or a folder: those that scripts.precompute stored
    config.frozen.first_stage = stage
    config.data.text_features = ""  # "auto" or a folder: those that scripts.precompute stored
    config.frozen.text = clip_vit.get_text_tower("pretrained/sd1")
    if argument.startswith("v2"):
        _read_with_open_clip(config.frozen.text)
    config.initialize.denoiser = ConfigDict({"source": start, "part": "denoiser"})
    config.models.denoiser = ConfigDict()
    config.models.denoiser.name = "unet"
    config.models.denoiser.image_size = image_size // 2 ** (len(stage.multipliers) - 1)
    config.models.denoiser.in_channels = stage.latent_channels
    config.models.denoiser.width = 320
    config.models.denoiser.multipliers = (1, 2, 4, 4)
    config.models.denoiser.attention_levels = (0, 1, 2)
    config.models.denoiser.blocks = 2
    config.models.denoiser.attention = "transformer"
    if argument.startswith("v2"):
        config.models.denoiser.head_width = 64
        config.models.denoiser.linear_projection = True
    else:
        config.models.denoiser.heads = 8
    config.models.denoiser.groups = 32
    config.models.denoiser.remat = "full" if image_size == 512 else "none"
    config.models.denoiser.implementation = "auto"
    config.models.denoiser.dtype = "bfloat16"

    config.process = get_process({"name": "discrete", "kind": "scaled_linear", "steps": 1000}, latents=True)
    config.process.schedule.start = 0.00085
    config.process.schedule.end = 0.012
    config.process.prediction = "eps"
    config.process.clip = False

    config.loss.dropout = dropout  # of the caption

    config.sample = get_diffusion_sampling("plms", steps=50, guidance=7.5)

    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.no_decay = r"(?!)"  # matches nothing: all parameters decay
    config.optimizer.schedule.name = "constant"
    config.optimizer.schedule.peak = 1e-4
    config.optimizer.schedule.warmup_steps = 10_000
    config.ema.decay = 0.9999

    config.mesh.fsdp = 8
    config.mesh.microbatches = 8 if image_size == 512 else 2
    config.mesh.rules = FIRST_STAGE + UNET
    config.mesh.topology = "v5e:16x16"  # see docs/tpu.md

    config.checkpoint.every = 5000
    config.evaluate.every = 5000
    config.evaluate.previews = 16
    config.log.every = 100
    if argument == "debug":
        make_debug(config, steps=steps, batch_size=8)
        config.mesh.microbatches = 1
        clip_vit.shrink_text_tower(config)
        config.models.denoiser.width = 8
        config.models.denoiser.multipliers = (1, 2)
        config.models.denoiser.attention_levels = (1,)
        config.models.denoiser.blocks = 1
        config.models.denoiser.heads = 1
        config.models.denoiser.groups = 4
        config.sample.steps = 3
    config.models.denoiser.context_width = config.frozen.text.text_width
    config.lock()
    return config


def _read_with_open_clip(tower: ConfigDict) -> None:
    """The text tower of version 2, whose last layer is left out and whose captions are padded with 0."""
    tower.text_width = 1024
    tower.text_layers = 23
    tower.text_pad_id = 0
    tower.activation = "gelu"
    tower.source = "pretrained/sd2"
