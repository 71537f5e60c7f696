"""Diffusion of a swiss roll in the plane, to be watched.

Paper: Sohl-Dickstein et al. 2015, "Deep Unsupervised Learning using Nonequilibrium Thermodynamics", section 3.1.1 and
figure 1; the objective is that of Ho et al. 2020. The paper's network is one of radial basis functions, and its chain
is learned; here it is a small multilayer perceptron, and the paper's fixed schedule.

    python -m train --config=configs/toy/swiss_roll.py --workdir=runs/swiss_roll
    python -m sample --run=runs/swiss_roll --out=swiss_roll.png

Hardware and time: 2 CPU cores, about a minute beside other work.

Arguments: `eps` (default), `x0`, `v`: what the network predicts, at equal training; `vp`: the variance-preserving SDE
in continuous time, which has an exact likelihood; `flow`: rectified flow; `edm`: the noise levels, preconditioning and
sampler of Karras et al. 2022; `debug` (seconds).
"""

from ml_collections import ConfigDict

from configs.common import check_argument, get_defaults, get_diffusion_sampling, get_process
from configs.mesh_rules import WHOLE


def get_config(argument: str = "") -> ConfigDict:
    """Returns the experiment."""
    argument = check_argument(argument, ("eps", "x0", "v", "vp", "flow", "edm", "debug"))
    config = get_defaults()
    config.objective = "diffusion"
    config.steps = 4000
    config.batch_size = 512

    config.data.dataset = "points/swiss_roll"

    config.models.denoiser = ConfigDict()
    config.models.denoiser.name = "point_denoiser"
    config.models.denoiser.width = 128
    config.models.denoiser.depth = 3

    chain = {"name": "discrete", "kind": "sohl_dickstein", "steps": 40}
    config.process = get_process({"name": argument} if argument in ("vp", "flow", "edm") else chain)
    config.process.sigma_data = 1.0  # of prediction edm
    config.process.prediction = argument if argument in ("x0", "v", "flow", "edm") else "eps"
    if argument == "edm":
        config.process.times = "log_normal"

    config.loss.dropout = 0.0

    sampler = {"vp": "dpm_solver_multistep", "flow": "heun", "edm": "heun"}.get(argument, "ddpm")
    config.sample = get_diffusion_sampling(sampler, steps=18 if argument == "edm" else 40)

    config.optimizer.schedule.peak = 2e-3
    config.optimizer.schedule.warmup_steps = 100
    config.optimizer.clip_norm = 1.0
    config.ema.decay = 0.999
    config.mesh.rules = WHOLE

    config.checkpoint.every = 2000
    config.evaluate.every = 2000
    config.evaluate.previews = 32
    config.log.every = 100
    config.wandb.mode = "disabled"
    if argument == "debug":
        config.steps = 4
        config.batch_size = 8
        config.models.denoiser.width = 16
        config.models.denoiser.depth = 1
        config.process.schedule.steps = 5
        config.sample.steps = 5
        config.checkpoint.every = config.evaluate.every = 2
        config.evaluate.batches = 1
        config.evaluate.previews = 4
        config.log.every = 1
        config.optimizer.schedule.warmup_steps = 1
    config.lock()
    return config
