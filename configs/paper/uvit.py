"""U-ViT on pixels as published: CIFAR-10, CelebA and ImageNet at 64 x 64.

Paper: Bao et al. 2023, "All are Worth Words: A ViT Backbone for Diffusion Models", section 4 and appendix.

    python -m train --config=configs/paper/uvit.py --workdir=runs/uvit_cifar10
    python -m train --config=configs/paper/uvit.py:imagenet64_m --workdir=runs/uvit_imagenet64_m
    python -m evaluation --run=runs/uvit_cifar10 --metrics=fid --splits=train --num=50000 --features=inception:FILE

Arguments, parameters and the authors' FID of 50,000 pictures: `cifar10` (default; S/2, 44,255,328; 3.11), `celeba64`
(S/4, 44,292,228; 2.87), `imagenet64_m` (M/4, 130,940,292; 5.85), `imagenet64_l` (L/4, 286,827,652; 4.26), `debug`
(seconds; told the background of scenes). The first two are unconditional, ImageNet's are told the class.

Hardware: the authors' commands use 4 GPUs for the first two and 8 for ImageNet; how long they took was not found. No
result of this config was measured here. The datasets are TFDS's `cifar10`, `celeb_a` and `imagenet2012`, which the user
prepares.

Every hyper-parameter is that of the authors' code (github.com/baofff/U-ViT, commit ce55170). In particular weight decay
is of all parameters, biases, norms and positions included; nothing is clipped or dropped out. ImageNet's classes are
1000 without one that stands for none, and no class is dropped in training: these networks cannot be guided. What
differs:

* Mixed precision is bfloat16, there float16.
* Training draws t from 1e-5 to 1, there from 0 to 1.
* Samples of 1000 steps: there the last of 1000 goes from t = 1e-3 to 0, here 1000 steps end at 1e-3. Of 50 steps: there
  DPM-Solver estimates the noise and ends at 1e-4, here the data and at 1e-3, with the same orders.
* A preview of ImageNet shows classes of the validation set's first pictures.
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_diffusion_sampling, make_debug
from configs.mesh_rules import UVIT

# argument -> (dataset, transform, image size, patch size, width, depth, heads, classes)
NETWORKS = {
    "cifar10": ("cifar10", "center_square_flip", 32, 2, 512, 12, 8, 0),
    "celeba64": ("celeb_a", "celeba_training", 64, 4, 512, 12, 8, 0),
    "imagenet64_m": ("imagenet2012", "adm_training", 64, 4, 768, 16, 12, 1000),
    "imagenet64_l": ("imagenet2012", "adm_training", 64, 4, 1024, 20, 16, 1000),
    "debug": ("scenes/single32", "center_square_flip", 32, 4, 32, 2, 2, 3),
}

# argument -> (peak learning rate, Adam's b2, warm-up, batch size, updates)
TRAINING = {
    "cifar10": (2e-4, 0.999, 2500, 128, 500_000),
    "celeba64": (2e-4, 0.99, 5000, 128, 500_000),
    "imagenet64_m": (3e-4, 0.99, 5000, 1024, 300_000),
    "imagenet64_l": (3e-4, 0.99, 5000, 1024, 300_000),
    "debug": (3e-4, 0.99, 1, 8, 4),
}


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, tuple(NETWORKS))
    dataset, transform, image_size, patch_size, width, depth, heads, classes = NETWORKS[argument]
    peak, b2, warmup_steps, batch_size, steps = TRAINING[argument]
    config = get_defaults()
    config.objective = "diffusion"
    config.steps = steps
    config.batch_size = batch_size

    config.data.dataset = dataset
    config.data.validation_split = "test" if dataset == "cifar10" else "validation"
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
    config.models.denoiser.convolution = "image"
    config.models.denoiser.positions = "learned"
    config.models.denoiser.scan = True
    config.models.denoiser.remat = "full" if classes else "none"
    config.models.denoiser.implementation = "auto"
    config.models.denoiser.dtype = "bfloat16"

    config.process = ConfigDict()
    config.process.schedule = ConfigDict({"name": "vp", "beta_min": 0.1, "beta_max": 20.0})
    config.process.prediction = "eps"
    config.process.clip = False

    config.loss.dropout = 0.0  # of the class

    if classes:
        config.sample = get_diffusion_sampling("dpm_solver_singlestep", steps=50)
    else:
        config.sample = get_diffusion_sampling("reverse_sde", steps=1000)

    config.optimizer.b1 = 0.99
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
    if argument == "debug":
        make_debug(config, steps=steps, batch_size=batch_size)
        config.data.label_field = "background"
        config.sample.steps = 3
    config.lock()
    return config
