"""Command-line arguments that choose weights and sampling settings, for every command that samples."""

import argparse
from typing import Any

_SETTINGS = ("guidance", "temperature", "top_k", "top_p")


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


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the overrides of `config.sample` that were given."""
    return {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
