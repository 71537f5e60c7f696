"""Command-line arguments that choose weights and sampling settings, for every command that samples."""

import argparse
from typing import Any

_SETTINGS = (
    *("guidance", "temperature", "top_k", "top_p"),
    *("sampler", "steps", "spacing", "eta", "rescale", "guidance_start", "guidance_stop"),
)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, its checkpoint, the seed, and overrides of `config.sample`."""
    parser.add_argument("--run", required=True, help="the run folder")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--no_ema", action="store_true", help="use the parameters, not their moving average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="default: the run's config.sample.guidance")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the run's config")
    parser.add_argument("--top_k", type=int, help="0 for all; default: the run's config")
    parser.add_argument("--top_p", type=float, help="1 for all; default: the run's config")
    diffusion = parser.add_argument_group("sampling of a diffusion (defaults: the run's config)")
    diffusion.add_argument("--sampler", help="such as ddpm, ddim, dpm_solver_multistep; a wrong one lists them all")
    diffusion.add_argument("--steps", type=int, help="of the sampler")
    diffusion.add_argument("--spacing", help="of its times, such as leading, trailing, karras; '' for its own")
    diffusion.add_argument("--eta", type=float, help="of ddim: 0 draws no noise, 1 as much as ddpm")
    diffusion.add_argument("--rescale", type=float, help="0 to 1: of guided pictures, to the spread of unguided ones")
    diffusion.add_argument("--guidance_start", type=float, help="share of the process before which there is none")
    diffusion.add_argument("--guidance_stop", type=float, help="share of the process after which there is none")


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the overrides of `config.sample` that were given."""
    return {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
