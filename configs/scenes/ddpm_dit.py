"""Diffusion of pixels on `scenes` with a small DiT that reads captions by cross-attention.

Paper: Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", with captions as in Chen et al. 2024,
"PixArt-alpha". Data, captions, process, sampler and optimizer are those of `configs/scenes/ddpm_uvit.py`.

    python -m scripts.prepare --dataset=scenes/single32
    python -m train --config=configs/scenes/ddpm_dit.py --workdir=runs/ddpm_dit

Hardware and time: CPU. It was not yet trained to its end here, so that no accuracy can be promised.

Arguments: `single32` (default; one object), `pair32` (one or two objects with a relation), `debug` (seconds).
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from configs.mesh_rules import DIT
from configs.scenes.ddpm_uvit import get_training, shrink


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("single32", "pair32", "debug"))
    config = get_training(pairs=argument == "pair32")
    config.models.denoiser.name = "dit"
    config.models.denoiser.patch_size = 4
    config.models.denoiser.width = 128
    config.models.denoiser.depth = 4
    config.models.denoiser.heads = 4
    config.mesh.rules = DIT
    if argument == "debug":
        shrink(config)
        config.models.denoiser.width = 32
        config.models.denoiser.depth = 1
    config.lock()
    return config
