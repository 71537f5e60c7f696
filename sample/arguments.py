"""Command-line arguments that choose weights and sampling settings, for every command that samples."""

import argparse
from collections.abc import Mapping
from typing import Any

# The settings of all samplers, which override `config.sample`.
SETTINGS: Mapping[str, type] = {
    "guidance": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "sampler": str,
    "steps": int,
    "spacing": str,
    "eta": float,
    "rescale": float,
    "guidance_start": float,
    "guidance_stop": float,
}


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, its checkpoint, the seed, and overrides of `config.sample`."""
    parser.add_argument("--run", required=True, help="the run folder")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--no_ema", action="store_true", help="use the parameters, not their moving average")
    parser.add_argument("--seed", type=int, default=0)
    helps = {
        "guidance": "default: the run's config.sample.guidance",
        "temperature": "0 is greedy; default: the run's config",
        "top_k": "0 for all; default: the run's config",
        "top_p": "1 for all; default: the run's config",
    }
    diffusion = {
        "sampler": "such as ddpm, ddim, dpm_solver_multistep; a wrong one lists them all",
        "steps": "of the sampler",
        "spacing": "of its times, such as leading, trailing, karras; '' for its own",
        "eta": "of ddim: 0 draws no noise, 1 as much as ddpm",
        "rescale": "0 to 1: of guided pictures, to the spread of unguided ones",
        "guidance_start": "share of the process before which there is none",
        "guidance_stop": "share of the process after which there is none",
    }
    group = parser.add_argument_group("sampling of a diffusion (defaults: the run's config)")
    for place, texts in ((parser, helps), (group, diffusion)):
        for name, text in texts.items():
            place.add_argument(f"--{name}", type=SETTINGS[name], help=text)


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the overrides of `config.sample` that were given."""
    return {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
