"""From trained weights to pictures, captions and tokens: one file a paper."""

from typing import Any

from ml_collections import ConfigDict

from cli.errors import UserError


def create_sampler(config: ConfigDict) -> Any:
    """Builds the sampler of a run: `sampler(params, variables, frozen, request, keys) -> outputs`.

    Raises:
      UserError: if nothing can be sampled from `config.objective`, or its networks cannot be built.
    """
    # Imported here: a command imports this package before it may import JAX (see cli/allocator.py).
    from sample.samplers.clip import ClipSampler
    from sample.samplers.dalle import DalleSampler
    from sample.samplers.diffusion import DiffusionSampler
    from sample.samplers.dvae import ReconstructionSampler

    samplers = {
        "clip": ClipSampler,
        "dalle": DalleSampler,
        "diffusion": DiffusionSampler,
        "dvae": ReconstructionSampler,
        "vqvae": ReconstructionSampler,
    }
    if config.objective not in samplers:
        raise UserError(f"nothing can be sampled from objective {config.objective!r}; only from {', '.join(samplers)}")
    return samplers[config.objective].from_config(config)
