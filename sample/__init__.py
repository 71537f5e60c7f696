"""From trained weights to pictures, captions and tokens: one file a paper. `python -m sample` runs them."""

from typing import Any

from ml_collections import ConfigDict

from cli.errors import UserError
from sample.dalle import DalleSampler
from sample.dvae import ReconstructionSampler

SAMPLERS: dict[str, Any] = {
    "dalle": DalleSampler,
    "dvae": ReconstructionSampler,
    "vqvae": ReconstructionSampler,
}


def create_sampler(config: ConfigDict) -> Any:
    """Builds the sampler of a run: `sampler(params, variables, frozen, request, keys) -> outputs`.

    Raises:
      UserError: if nothing can be sampled from `config.objective`.
    """
    if config.objective not in SAMPLERS:
        raise UserError(f"nothing can be sampled from objective {config.objective!r}; only from {', '.join(SAMPLERS)}")
    return SAMPLERS[config.objective].from_config(config)
