"""Times diffusion beside torch: `PYTHONPATH=. python tests/parity/benchmark_diffusion.py --model=small_unet`.

A training step (forward, error of the noise, backward, AdamW) and sampling (DPM-Solver++ 2M, guided where there is a
condition) of ours, of diffusers' UNets, and of those under torch.compile. U-ViT, which diffusers lacks, is measured
beside `torch_uvit.py`, which has the same layers of torch's own.

The same architecture, weights, inputs, batch, threads and float32, in one process and in alternating windows, all
warmed up first. Outputs, and the pictures that sampling ends in, are compared before they are timed. With
`--device=gpu` both compute in bfloat16 (torch by autocast), and the share of the device's peak is printed.
"""

import argparse
import copy
import dataclasses
import importlib
import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

from network_pair import Pair, assert_agree, from_torch, to_torch
from side_by_side import Run, print_side_by_side, time_in_turn

from cli.allocator import reexec_with_fast_allocator

_SD = {
    **{"name": "unet", "image_size": 16, "in_channels": 4, "width": 320, "multipliers": (1, 2, 4, 4), "blocks": 2},
    **{"attention_levels": (0, 1, 2), "attention": "transformer", "heads": 8, "context_width": 768},
}
_DDPM = {
    **{"name": "unet", "image_size": 32, "in_channels": 3, "width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2},
    **{"attention_levels": (1,), "heads": 1, "sine_first": True, "last_period": True, "norm_epsilon": 1e-6},
    **{"downsample_padding": (0, 1), "kernel_init": "fan_avg"},
}
_UVIT_S = {"name": "uvit", "image_size": 32, "patch_size": 2, "width": 512, "depth": 12, "heads": 8}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      network: a config whose denoiser it is, or {"name", fields}.
      length: tokens of the context; 0 for a network without one, which is not guided.
      batch_size: of a training step and of a call of the sampler.
    """

    network: str | dict[str, Any]
    length: int
    batch_size: int


MODELS = {
    "small_unet": Case("configs/scenes/ddpm_unet.py", 12, 64),
    "small_uvit": Case("configs/scenes/ddpm_uvit.py", 12, 64),
    "ddpm_unet": Case(_DDPM, 0, 4),  # 35.7 M parameters, of CIFAR-10
    "uvit_s": Case(_UVIT_S, 0, 8),  # U-ViT-S/2 of CIFAR-10
    "sd_unet": Case(_SD, 77, 1),  # Stable Diffusion 1's, on 16 x 16 latents
}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small_unet")
    parser.add_argument("--measure", default="train,sample", help="train, sample, or both with a comma")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--batch_size", type=int, help="of both; each model has its own default")
    parser.add_argument("--solver_steps", type=int, default=10)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="updates in a window; of sampling one call is one window")
    parser.add_argument("--compile", choices=("yes", "no"), default="yes", help="also time torch.compile")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="of ours")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: on a busy machine, with one core")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has the same GPU
    importlib.import_module("conftest")  # lies beside this file; makes torchvision importable, which diffusers asks for
    import jax

    jax.config.update("jax_platforms", "cpu" if options.device == "cpu" else "cuda")
    case = MODELS[options.model]
    pair = Pair.create(
        read_network(case.network) if isinstance(case.network, str) else case.network,
        batch_size=options.batch_size or case.batch_size,
        length=case.length,
        attention=options.attention,
        device="cuda" if options.device == "gpu" else "cpu",
    )
    compiled = options.compile == "yes"
    if compiled and options.device == "cpu" and shutil.which("g++") is None:
        print("torch.compile is left out: it needs a C++ compiler, and there is no g++")
        compiled = False
    measured = {"train": (training, "step"), "sample": (sampling, "picture")}
    for name in options.measure.split(","):
        prepare, what = measured[name]
        runs, flops = prepare(pair, options, compiled)
        steps = options.steps if name == "train" else 1
        seconds = time_in_turn(runs, windows=options.windows, steps=steps, clock=CLOCKS[options.clock])
        unit = 1 if name == "train" else pair.batch_size
        print(f"{options.model}, {name}, batch {pair.batch_size}:")
        print_side_by_side({label: spread.over(unit) for label, spread in seconds.items()}, what)
        print_rates({label: flops / spread.median for label, spread in seconds.items()}, options.device)


def read_network(path: str) -> dict[str, Any]:
    """The denoiser of a config; of a UNet what lies between folding and unfolding patches, which torch's has not."""
    from cli.config import load_config

    fields = load_config([f"--config={path}"]).models.denoiser.to_dict()
    if fields["name"] == "unet":
        side = fields.pop("patch_size", 1)
        fields |= {"image_size": fields["image_size"] // side, "in_channels": fields["in_channels"] * side**2}
    return fields


def training(pair: Pair, options: argparse.Namespace, compiled: bool) -> tuple[dict[str, Run], int]:
    """Updates of both, and the FLOPs of one."""
    import numpy as np
    import torch

    x_t, t, tokens = pair.inputs()
    eps = np.random.default_rng(3).normal(size=x_t.shape).astype(np.float32)
    ours, flops = jax_step(pair, {"x_t": x_t, "t": t, "eps": eps, **({} if tokens is None else {"tokens": tokens})})
    arguments = [to_torch(value, pair.device) for value in (x_t, t, tokens)]
    target = to_torch(eps, pair.device)

    def torch_step(compile: bool) -> Run:
        model = copy.deepcopy(pair.network).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
        network = torch.compile(model) if compile else model

        def run(count: int) -> None:
            for _ in range(count):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(pair.call(network, *arguments), target).backward()
                optimizer.step()
            synchronize(pair.device)

        return run

    return {"jax": ours, "torch": torch_step(False), **({"torch.compile": torch_step(True)} if compiled else {})}, flops


def jax_step(pair: Pair, batch: Mapping[str, Any]) -> tuple[Run, int]:
    """Updates by the project's own step, which donates its state, and the FLOPs of one."""
    import jax
    import jax.numpy as jnp

    from configs.common import get_defaults
    from cost.flops import matrix_flops
    from models.conditioning import Conditioning
    from train.objectives.contract import Aux
    from train.optimizer import create_optimizer
    from train.state import create_state
    from train.step import make_train_step

    class NoiseError:
        """The objective: the mean squared error of the noise in given x_t."""

        def loss(self, params: Any, variables: Any, frozen: Any, batch: Any, *_: Any) -> tuple[Any, Aux]:
            told = Conditioning(tokens=batch.get("tokens"))
            error = pair.model.apply({"params": params}, batch["x_t"], batch["t"], told, True) - batch["eps"]
            return jnp.mean(jnp.square(error)), Aux(metrics={}, variables=variables)

    config = get_defaults()
    config.steps = 10**6
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule.peak = 1e-4
    optimizer, schedule = create_optimizer(config.optimizer, pair.params, config.steps)
    step = make_train_step(config, NoiseError(), optimizer, schedule)
    compiled = jax.jit(step, donate_argnums=0)
    rows = jax.device_put({**batch, "index": jnp.arange(pair.batch_size)})
    params = jax.tree.map(jnp.copy, pair.params)
    state = create_state(params, {}, optimizer.init(params), averaged={})

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _, _ = compiled(state, {}, rows)
        jax.block_until_ready(state)

    return run, matrix_flops(step, state, {}, rows)


def sampling(pair: Pair, options: argparse.Namespace, compiled: bool) -> tuple[dict[str, Run], int]:
    """Calls of both samplers, and the FLOPs of one; raises AssertionError unless both draw the same pictures."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from diffusers import DPMSolverMultistepScheduler

    from cost.flops import matrix_flops
    from diffusion.process import Process
    from diffusion.schedule import DiscreteSchedule
    from sample.samplers.diffusion import DiffusionSampler, Steps
    from sample.text_context import TextContext

    count, shape = pair.batch_size, pair.model.example_inputs(1)[0].shape[1:]
    guided = pair.table is not None
    text = None
    trees = {"denoiser": pair.params}
    if pair.table is not None:
        text = TextContext(nn.Embed(*pair.table.shape), "text", (0,) * pair.length)
        trees["text"] = {"embedding": jnp.asarray(pair.table)}
    sampler = DiffusionSampler(
        pair.model,
        Process(DiscreteSchedule("linear"), prediction="eps"),
        text,
        Steps("dpm_solver_multistep", options.solver_steps),
        guidance=2.0 if guided else 1.0,
    )
    request = sampler.request(text=pair.captions() if guided else None)
    keys = jax.random.split(jax.random.key(0), count)

    def draw(params: Any) -> Any:
        return sampler(params, {}, {}, request, keys)["image"]

    first = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)
    first = to_torch(sampler.plan(sampler.defaults).first_scale * np.asarray(first), pair.device)
    told = None
    if pair.table is not None:
        tokens = pair.table[np.concatenate([np.zeros_like(pair.captions()), pair.captions()])]
        told = to_torch(tokens, pair.device)

    def torch_draw(network: Any) -> Any:
        scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
        scheduler.set_timesteps(options.solver_steps)
        x = first
        for t in scheduler.timesteps:
            both = torch.cat([x, x]) if guided else x
            output = pair.call(network, both, torch.full((len(both),), float(t), device=pair.device), told)
            if guided:
                uncond, cond = output.chunk(2)
                output = uncond + float(request["guidance"]) * (cond - uncond)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    def torch_run(network: Any) -> Run:
        def run(repetitions: int) -> None:
            with torch.inference_mode():
                for _ in range(repetitions):
                    torch_draw(network)
            synchronize(pair.device)

        return run

    def run(repetitions: int) -> None:
        for _ in range(repetitions):
            jax.block_until_ready(draw(trees))

    network = pair.network.eval()
    with torch.inference_mode():
        assert_agree(
            np.asarray(draw(trees)), from_torch(torch_draw(network)), "pictures", 1e-2 if pair.device == "cpu" else 0.5
        )
    runs = {"jax": run, "torch": torch_run(network)}
    if compiled:
        runs["torch.compile"] = torch_run(torch.compile(network))
    return runs, matrix_flops(draw, trees)


def print_rates(rates: Mapping[str, float], device: str) -> None:
    """Prints FLOPs a second that matrix products and convolutions amount to; on a GPU also as a share of its peak."""
    import jax

    from cost.peak_flops import peak_flops

    peak = peak_flops(jax.local_devices()[0], "bfloat16") if device == "gpu" else None
    for label, rate in rates.items():
        share = f", {rate / peak.flops:.1%} of {peak.source}" if peak else ""
        print(f"{label}: {rate / 1e9:.0f} GFLOP/s{share}")


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    reexec_with_fast_allocator()
    main()
