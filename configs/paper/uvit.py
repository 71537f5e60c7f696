"""U-ViT as published: on pixels CIFAR-10, CelebA and ImageNet at 64 x 64; in latents ImageNet at 256 and 512, and COCO.

Paper: Bao et al. 2023, "All are Worth Words: A ViT Backbone for Diffusion Models", section 4 and appendix.

    python -m train --config=configs/paper/uvit.py --workdir=runs/uvit_cifar10
    python -m train --config=configs/paper/uvit.py:imagenet64_m --workdir=runs/uvit_imagenet64_m
    python -m train --config=configs/paper/uvit.py:imagenet256_h --workdir=runs/uvit_imagenet256_h
    python -m evaluation --run=runs/uvit_cifar10 --metrics=fid --splits=train --num=50000 --features=inception:FILE

Arguments, parameters and the authors' FID, of 50,000 pictures and for COCO of 30,000. Of pixels: `cifar10` (default;
S/2, 44,255,328; 3.11), `celeba64` (S/4, 44,292,228; 2.87), `imagenet64_m` (M/4, 130,940,292; 5.85), `imagenet64_l`
(L/4, 286,827,652; 4.26). In latents: `imagenet256_l` (L/2, 286,763,172; 3.40), `imagenet256_h` (H/2, 500,832,016;
2.29), `imagenet512_l` (L/4, 286,861,524; 4.67), `imagenet512_h` (H/4, 500,942,656; 4.05), `coco_s` (S/2, 44,692,644;
5.95), `coco_s_deep` (S/2-Deep, 58,345,636; 5.48). `debug` and `debug_coco` (seconds; on scenes). The first two are
unconditional, ImageNet's are told the class, COCO's read captions.

Hardware: the authors' commands use 4 GPUs for the first two and COCO and 8 for ImageNet; how long they took was not
found. No result of this config was measured here. The datasets are TFDS's `cifar10`, `celeb_a`, `imagenet2012` and
`coco_captions`, which the user prepares.

Latents are of Stable Diffusion's first stage, pretrained/sd_vae, multiplied by 0.18215, for COCO by 0.2301; captions
are read by the text tower of CLIP L/14, pretrained/sd1. docs/latent_diffusion.md says how both get there.

Every hyper-parameter is that of the authors' code (github.com/baofff/U-ViT, commit ce55170). In particular weight decay
is of all parameters, biases, norms and positions included; nothing is clipped or dropped out. ImageNet's classes at 64
pixels are 1000 without one that stands for none, and no class is dropped in training: these networks cannot be guided.
All in latents can; guidance is 1 + s of the authors' s. What differs:

* Mixed precision is bfloat16, there float16.
* In continuous time training draws t from 1e-5 to 1, there from 0 to 1.
* Samples of 1000 steps: there the last of 1000 goes from t = 1e-3 to 0, here 1000 steps end at 1e-3. Of 50 steps of
  pixels: there DPM-Solver estimates the noise and ends at 1e-4, here the data and at 1e-3, with the same orders.
* A preview of ImageNet shows classes of the validation set's first pictures.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_diffusion_sampling, get_process, make_debug
from configs.mesh_rules import UVIT, WHOLE_FIRST_STAGE
from configs.paper import clip_vit, first_stage

# argument -> (dataset, transform, image size, patch size, width, depth, heads, classes)
NETWORKS = {
    "cifar10": ("cifar10", "center_square_flip", 32, 2, 512, 12, 8, 0),
    "celeba64": ("celeb_a", "celeba_training", 64, 4, 512, 12, 8, 0),
    "imagenet64_m": ("imagenet2012", "adm_training", 64, 4, 768, 16, 12, 1000),
    "imagenet64_l": ("imagenet2012", "adm_training", 64, 4, 1024, 20, 16, 1000),
    "imagenet256_l": ("imagenet2012", "adm_training", 256, 2, 1024, 20, 16, 1001),
    "imagenet256_h": ("imagenet2012", "adm_training", 256, 2, 1152, 28, 16, 1001),
    "imagenet512_l": ("imagenet2012", "adm_training", 512, 4, 1024, 20, 16, 1001),
    "imagenet512_h": ("imagenet2012", "adm_training", 512, 4, 1152, 28, 16, 1001),
    "coco_s": ("coco_captions", "center_square", 256, 2, 512, 12, 8, 0),
    "coco_s_deep": ("coco_captions", "center_square", 256, 2, 512, 16, 8, 0),
    "debug": ("scenes/single32", "center_square_flip", 32, 4, 32, 2, 2, 3),
    "debug_coco": ("scenes/single32", "center_square", 32, 4, 32, 2, 2, 0),
}

# argument -> (peak learning rate, Adam's b1 and b2, warm-up, batch size, updates)
TRAINING = {
    "cifar10": (2e-4, 0.99, 0.999, 2500, 128, 500_000),
    "celeba64": (2e-4, 0.99, 0.99, 5000, 128, 500_000),
    "imagenet64_m": (3e-4, 0.99, 0.99, 5000, 1024, 300_000),
    "imagenet64_l": (3e-4, 0.99, 0.99, 5000, 1024, 300_000),
    "imagenet256_l": (2e-4, 0.99, 0.99, 5000, 1024, 300_000),
    "imagenet256_h": (2e-4, 0.99, 0.99, 5000, 1024, 500_000),
    "imagenet512_l": (2e-4, 0.99, 0.99, 5000, 1024, 500_000),
    "imagenet512_h": (2e-4, 0.99, 0.99, 5000, 1024, 500_000),
    "coco_s": (2e-4, 0.9, 0.9, 5000, 256, 1_000_000),
    "coco_s_deep": (2e-4, 0.9, 0.9, 5000, 256, 1_000_000),
    "debug": (3e-4, 0.99, 0.99, 1, 8, 4),
    "debug_coco": (2e-4, 0.9, 0.9, 1, 8, 4),
}

# argument, of those in latents -> (scale of the latents, whether time is continuous, dropped conditions, guidance)
LATENTS = {
    "imagenet256_l": (0.18215, True, 0.15, 1.4),
    "imagenet256_h": (0.18215, False, 0.1, 1.4),
    "imagenet512_l": (0.18215, True, 0.15, 1.7),
    "imagenet512_h": (0.18215, False, 0.1, 1.7),
    "coco_s": (0.2301, False, 0.1, 2.0),
    "coco_s_deep": (0.2301, False, 0.1, 2.0),
    "debug_coco": (0.2301, False, 0.1, 2.0),
}


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, tuple(NETWORKS))
    dataset, transform, image_size, patch_size, width, depth, heads, classes = NETWORKS[argument]
    peak, b1, b2, warmup_steps, batch_size, steps = TRAINING[argument]
    config = get_defaults()
    config.objective = "diffusion"
    config.steps = steps
    config.batch_size = batch_size

    config.data.dataset = dataset
    config.data.validation_split = {"cifar10": "test", "coco_captions": "val"}.get(dataset, "validation")
    config.data.image_size = image_size
    config.data.transform = transform
    config.data.label_field = "label" if classes else ""
    config.data.cache = dataset == "cifar10"
    config.data.workers = 4 if dataset == "cifar10" else 16

    config.initialize.denoiser = ConfigDict({"source": "", "part": "denoiser"})  # a run to fine-tune from
    config.models.denoiser = ConfigDict()
    config.models.denoiser.name = "uvit"
    config.models.denoiser.image_size = image_size
    config.models.denoiser.patch_size = patch_size
    config.models.denoiser.width = width
    config.models.denoiser.depth = depth
    config.models.denoiser.heads = heads
    config.models.denoiser.num_classes = classes
    config.models.denoiser.long_skip = "concat"
    config.models.denoiser.time = "token"
    config.models.denoiser.convolution = "none" if argument.endswith("_h") else "image"
    config.models.denoiser.positions = "learned"
    config.models.denoiser.scan = True
    config.models.denoiser.remat = "full" if classes else "none"
    config.models.denoiser.implementation = "auto"
    config.models.denoiser.dtype = "bfloat16"

    config.process = get_process({"name": "vp", "beta_min": 0.1, "beta_max": 20.0})
    config.process.prediction = "eps"
    config.process.clip = False

    config.loss.dropout = 0.0  # of the class

    if classes:
        config.sample = get_diffusion_sampling("dpm_solver_singlestep", steps=50)
    else:
        config.sample = get_diffusion_sampling("reverse_sde", steps=1000)

    config.optimizer.b1 = b1
    config.optimizer.b2 = b2
    config.optimizer.weight_decay = 0.03
    config.optimizer.no_decay = r"(?!)"  # matches nothing: all parameters decay
    config.optimizer.schedule.name = "warmup_steps_down"  # constant behind the warm-up
    config.optimizer.schedule.peak = peak
    config.optimizer.schedule.warmup_steps = warmup_steps
    config.ema.decay = 0.9999
    config.ema.warm_up = False

    config.mesh.rules = UVIT
    config.mesh.topology = "v5e:4x4" if classes else "v5e:2x4"  # see docs/tpu.md

    config.checkpoint.every = 5000
    config.evaluate.every = 5000
    config.evaluate.previews = 16
    config.log.every = 100
    if argument in LATENTS:
        _learn_latents(config, argument)
    if argument.startswith("debug"):
        make_debug(config, steps=steps, batch_size=batch_size)
        config.sample.steps = 3
    if argument == "debug":
        config.data.label_field = "background"
    config.lock()
    return config


def _learn_latents(config: ConfigDict, argument: str) -> None:
    """What the networks of Stable Diffusion's latents have of their own."""
    scale, continuous, dropout, guidance = LATENTS[argument]
    debug = argument.startswith("debug")
    config.data.latent_moments = ""  # "auto" or a folder: those that scripts.precompute stored
    config.frozen.first_stage = first_stage.get_frozen("debug" if debug else "kl_f8", "pretrained/sd_vae", scale)
    config.models.denoiser.image_size //= 2 ** (len(config.frozen.first_stage.multipliers) - 1)
    config.models.denoiser.in_channels = config.frozen.first_stage.latent_channels
    config.process.sigma_data = 1.0  # of prediction edm
    if not continuous:
        config.process.schedule = get_process({"name": "discrete", "kind": "scaled_linear", "steps": 1000}).schedule
        config.process.schedule.start = 0.00085
        config.process.schedule.end = 0.012
        config.process.time_shift = 1  # steps are counted from 1
    if not config.models.denoiser.num_classes:
        config.data.text_features = ""  # "auto" or a folder: those that scripts.precompute stored
        config.frozen.text = clip_vit.get_text_tower("pretrained/sd1")
        config.data.text_length = 77
        config.data.tokenizer = "pretrained/sd1/tokenizer.json"
        if debug:
            clip_vit.shrink_text_tower(config)
        config.models.denoiser.context_length = config.data.text_length
        config.models.denoiser.context_width = config.frozen.text.text_width
    config.loss.dropout = dropout
    config.sample = get_diffusion_sampling("dpm_solver_singlestep", steps=50, guidance=guidance)
    config.sample.spacing = "time"
    config.mesh.rules = WHOLE_FIRST_STAGE + UVIT
    config.mesh.topology = "v5e:8x8" if config.models.denoiser.num_classes else "v5e:4x4"
