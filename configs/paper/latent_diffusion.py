"""Latent diffusion as published: LDM-4 of ImageNet's classes, and the text-to-image network of 1.45 billion.

Paper: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 4.3 and appendix E.

    python -m train --config=configs/paper/latent_diffusion.py --workdir=runs/ldm4_imagenet
    python -m train --config=configs/paper/latent_diffusion.py:text --workdir=runs/ldm8_text --config.data.dataset=...
    python -m evaluation --run=runs/ldm4_imagenet --metrics=fid --splits=train --num=50000 --features=inception:FILE

Arguments, all of pictures of 256 x 256: `imagenet` (default; a UNet of 400,920,579 parameters, and 512,512 in a table
of classes), `text` (a UNet of 872,300,484 and, trained with it, a transformer of 542,895,360 that reads captions),
`debug` and `debug_text` (seconds; on scenes).

The paper's results, from a summary of it and not checked against its text: FID 3.60 for `imagenet` in 250 steps with
guidance 1.5 and 10.56 without, 12.63 for `text` on COCO with guidance 1.5. Hardware: single A100s and V100s, from there
too. No result of this config was measured here. The datasets are TFDS's `imagenet2012` and, for captions, LAION-400M,
which the user prepares (docs/own_data.md). First stages are those of configs/paper/first_stage.py: runs/vq_f4 and
runs/kl_f8, or the released ones, converted (docs/latent_diffusion.md).

Networks and schedules are those of the configs released with the models (github.com/CompVis/latent-diffusion, commit
a506df5), whose optimizer is AdamW with its usual decay of 0.01 of all parameters and whose moving average begins with
(1 + n) / (10 + n). Batch sizes, updates and rates are in the paper's tables alone and from the summary too. How often a
condition is dropped was not found and is set to one in ten. What differs:

* Captions are cut into ids by this project's tokenizer; there by BERT's, whose number of ids this network keeps.
* The published transformer has an unused layer of logits besides (39,098,682 parameters).
* Networks compute in bfloat16, there in float32.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_diffusion_sampling, get_process, make_debug
from configs.mesh_rules import FIRST_STAGE, UNET
from configs.paper import first_stage

ARGUMENTS = ("imagenet", "text", "debug", "debug_text")


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ARGUMENTS)
    text, debug = argument.endswith("text"), argument.startswith("debug")
    config = get_defaults()
    config.objective = "diffusion"
    config.steps = 390_000 if text else 178_000
    config.batch_size = 680 if text else 1200

    config.data.image_size = 256
    config.data.workers = 16

    config.initialize.denoiser = ConfigDict({"source": "", "part": "denoiser"})  # a run to fine-tune from
    config.models.denoiser = ConfigDict()
    config.models.denoiser.name = "unet"
    config.models.denoiser.blocks = 2
    config.models.denoiser.attention = "transformer"
    config.models.denoiser.groups = 32
    config.models.denoiser.implementation = "auto"
    config.models.denoiser.dtype = "bfloat16"

    config.process = get_process({"name": "discrete", "kind": "scaled_linear", "steps": 1000}, latents=True)
    config.process.prediction = "eps"
    config.process.clip = False

    config.loss.dropout = 0.1  # of the condition

    config.sample = get_diffusion_sampling("ddim", steps=250, guidance=1.5)

    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.no_decay = r"(?!)"  # matches nothing: all parameters decay
    config.optimizer.schedule.name = "constant"
    config.optimizer.schedule.peak = 1e-4
    config.ema.decay = 0.9999

    config.mesh.rules = FIRST_STAGE + UNET

    config.checkpoint.every = 5000
    config.evaluate.every = 5000
    config.evaluate.previews = 16
    config.log.every = 100
    if text:
        _read_captions(config)
    else:
        _know_classes(config)
    if debug:
        _shrink(config, text)
    config.lock()
    return config


def _know_classes(config: ConfigDict) -> None:
    """LDM-4: latents of 64 x 64 x 3, a token for each class."""
    config.data.dataset = "imagenet2012"
    config.data.transform = "adm_training"
    config.data.label_field = "label"
    config.data.latent_moments = ""  # "auto" or a folder: those that scripts.precompute stored
    config.frozen.first_stage = first_stage.get_frozen("vq_f4", "runs/vq_f4", 1.0)
    config.models.denoiser.image_size = 64
    config.models.denoiser.in_channels = 3
    config.models.denoiser.width = 192
    config.models.denoiser.multipliers = (1, 2, 3, 5)
    config.models.denoiser.attention_levels = (1, 2, 3)
    config.models.denoiser.heads = 1
    config.models.denoiser.context_width = 512
    config.models.denoiser.num_classes = 1001
    config.models.denoiser.class_embedding = "token"
    config.process.schedule.start = 0.0015
    config.process.schedule.end = 0.0195
    config.mesh.microbatches = 15
    config.mesh.topology = "v5e:4x4"  # see docs/tpu.md


def _read_captions(config: ConfigDict) -> None:
    """LDM-8: latents of 32 x 32 x 4, and a transformer that reads captions."""
    config.data.dataset = "folder/laion_400m"
    config.data.transform = "center_square"
    config.data.text_length = 77
    config.data.latent_moments = ""  # "auto" or a folder: those that scripts.precompute stored
    config.frozen.first_stage = first_stage.get_frozen("kl_f8", "runs/kl_f8", 0.18215)
    config.initialize.text = ConfigDict({"source": "", "part": "text"})  # likewise
    config.models.denoiser.image_size = 32
    config.models.denoiser.in_channels = 4
    config.models.denoiser.width = 320
    config.models.denoiser.multipliers = (1, 2, 4, 4)
    config.models.denoiser.attention_levels = (0, 1, 2)
    config.models.denoiser.heads = 8
    config.models.denoiser.context_width = 1280
    config.models.text = ConfigDict()
    config.models.text.name = "text_encoder"
    config.models.text.text_vocab_size = 30_522
    config.models.text.text_length = 77
    config.models.text.width = 1280
    config.models.text.layers = 32
    config.models.text.heads = 8
    config.models.text.head_dim = 64
    config.models.text.attention_bias = False
    config.models.text.scan = True
    config.models.text.dtype = "bfloat16"
    config.process.schedule.start = 0.00085
    config.process.schedule.end = 0.012
    config.mesh.fsdp = 8
    config.mesh.microbatches = 17
    config.mesh.topology = "v5e:2x4"  # see docs/tpu.md


def _shrink(config: ConfigDict, text: bool) -> None:
    """Makes a debug variant."""
    make_debug(config, steps=4, batch_size=8)
    config.mesh.microbatches = 1
    config.frozen.first_stage = first_stage.get_frozen("debug", "", config.frozen.first_stage.latent_scale)
    config.models.denoiser.image_size = 16
    config.models.denoiser.in_channels = config.frozen.first_stage.latent_channels
    config.models.denoiser.width = 8
    config.models.denoiser.multipliers = (1, 2)
    config.models.denoiser.attention_levels = ()  # the middle reads its context too
    config.models.denoiser.blocks = 1
    config.models.denoiser.heads = 1
    config.models.denoiser.context_width = 32
    config.models.denoiser.groups = 4
    config.sample.steps = 3
    if text:
        config.data.text_length = config.models.text.text_length = 12
        config.models.text.text_vocab_size = 351  # what the dataset's tokenizer has
        config.models.text.width = 32
        config.models.text.layers = 1
        config.models.text.heads = 1
        config.models.text.head_dim = 16
    else:
        config.data.label_field = "background"
        config.models.denoiser.num_classes = 4
