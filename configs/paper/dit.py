"""DiT as published, and SiT, the same network trained on rectified flow: ImageNet at 256 x 256, in latents.

Paper: Peebles & Xie 2023, "Scalable Diffusion Models with Transformers"; for the arguments that begin with `sit`, Ma et
al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers".

    python -m train --config=configs/paper/dit.py --workdir=runs/dit_xl2
    python -m train --config=configs/paper/dit.py:sit_xl2 --workdir=runs/sit_xl2
    python -m evaluation --run=runs/dit_xl2 --metrics=fid --splits=train --num=50000 --features=inception:FILE

Arguments: sizes s, b, l and xl with patches of 2, 4 and 8 latents, such as `xl2` (default; 674,834,720 parameters),
`b4` or `s8`; `sit_s2`, `sit_b2`, `sit_l2`, `sit_xl2` (674,816,272); `debug` and `debug_sit` (seconds; on scenes). The
largest are trained for 7 million updates, all others for 400,000, as in the papers' comparison of sizes.

Abstracts of the papers: FID 2.27 for DiT-XL/2 and 2.06 for SiT-XL/2, with guidance, of 50,000 pictures. Hardware, of
which their texts speak, was not checked. No result of this config was measured here. The dataset is TFDS's
`imagenet2012`, which the user prepares; latents are of Stable Diffusion's first stage, pretrained/sd_vae
(docs/latent_diffusion.md says how it gets there), multiplied by 0.18215.

Hyper-parameters are those of the authors' code (github.com/facebookresearch/DiT): a constant rate without warm-up or
weight decay, nothing clipped or dropped but one class in ten, noise with learned variances, whose bound counts beside
the squared error. Guidance is of three of the four channels, as there. What differs:

* Networks compute in bfloat16, there in float32 (TF32).
* SiT's network has outputs for variances that nobody reads; here it has none, so there are 18,448 parameters less.
* SiT is told t from 0, noise, to 1, data; here 1000 t, with noise at the end, and it predicts the velocity backwards.
* SiT's samples are by its SDE in 250 steps, whose times are ours.
* A preview shows classes of the validation set's first pictures.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_diffusion_sampling, get_process, make_debug
from configs.mesh_rules import DIT, WHOLE_FIRST_STAGE
from configs.paper import first_stage

# size -> (width, depth, heads)
SIZES = {"xl": (1152, 28, 16), "l": (1024, 24, 16), "b": (768, 12, 12), "s": (384, 12, 6)}

# argument -> (size, patch size)
NETWORKS = {
    **{f"{size}{patch}": (size, patch) for size in SIZES for patch in (2, 4, 8)},
    **{f"sit_{size}2": (size, 2) for size in SIZES},
    "debug": ("s", 4),
    "debug_sit": ("s", 4),
}


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, tuple(NETWORKS))
    size, patch_size = NETWORKS[argument]
    width, depth, heads = SIZES[size]
    debug = argument.startswith("debug")
    config = get_defaults()
    config.objective = "diffusion"
    config.steps = 7_000_000 if argument in ("xl2", "sit_xl2") else 400_000
    config.batch_size = 256

    config.data.dataset = "imagenet2012"
    config.data.image_size = 256
    config.data.transform = "adm_training"
    config.data.label_field = "label"
    config.data.workers = 16

    stage = first_stage.get_frozen("debug" if debug else "kl_f8", "pretrained/sd_vae", 0.18215)
    config.data.latent_moments = ""  # "auto" or a folder: those that scripts.precompute stored
    config.frozen.first_stage = stage
    config.initialize.denoiser = ConfigDict({"source": "", "part": "denoiser"})  # a run to fine-tune from
    config.models.denoiser = ConfigDict()
    config.models.denoiser.name = "dit"
    config.models.denoiser.image_size = 32
    config.models.denoiser.patch_size = patch_size
    config.models.denoiser.in_channels = stage.latent_channels
    config.models.denoiser.width = width
    config.models.denoiser.depth = depth
    config.models.denoiser.heads = heads
    config.models.denoiser.num_classes = 1001
    config.models.denoiser.scan = True
    config.models.denoiser.remat = "none"
    config.models.denoiser.implementation = "auto"
    config.models.denoiser.dtype = "bfloat16"

    if "sit" in argument:
        config.process = get_process({"name": "flow"}, latents=True)
        config.process.prediction = "flow"
        config.sample = get_diffusion_sampling("flow_sde", steps=250, guidance=1.5)
    else:
        config.process = get_process({"name": "discrete", "kind": "linear", "steps": 1000}, latents=True)
        config.process.schedule.start = 1e-4
        config.process.schedule.end = 0.02
        config.process.prediction = "eps"
        config.process.variance = "learned"
        config.models.denoiser.out_channels = 2 * stage.latent_channels
        config.sample = get_diffusion_sampling("ddpm", steps=250, guidance=1.5)
        config.sample.spacing = "linspace"
    config.process.clip = False
    config.sample.guided_channels = 3

    config.loss.dropout = 0.1  # of the class

    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule.name = "constant"
    config.optimizer.schedule.peak = 1e-4
    config.ema.decay = 0.9999
    config.ema.warm_up = False

    config.mesh.fsdp = 8 if size == "xl" else 1
    config.mesh.rules = WHOLE_FIRST_STAGE + DIT
    config.mesh.topology = "v5e:4x4"  # see docs/tpu.md

    config.checkpoint.every = 5000
    config.evaluate.every = 10_000
    config.evaluate.previews = 16
    config.log.every = 100
    if debug:
        make_debug(config, steps=4, batch_size=8)
        config.data.label_field = "background"
        config.models.denoiser.image_size = 16
        config.models.denoiser.width = 32
        config.models.denoiser.depth = 2
        config.models.denoiser.heads = 2
        config.models.denoiser.num_classes = 4
        config.sample.steps = 3
    config.lock()
    return config
