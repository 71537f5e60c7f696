"""From trained weights to pictures, text and tokens: one file a paper; the contract is in `contract.py`."""

from typing import Any

from ml_collections import ConfigDict

from cli.errors import UserError


def create_sampler(config: ConfigDict) -> Any:
    """Builds the sampler of a run: `sampler(params, variables, frozen, request, keys) -> outputs`.

    Raises:
      UserError: if nothing can be sampled from `config.objective`, or its networks cannot be built.
    """
    # Imported here: a command imports this package before it may import JAX (see cli/allocator.py).
    from sample.samplers.registry import SAMPLERS

    if config.objective not in SAMPLERS:
        raise UserError(f"nothing can be sampled from objective {config.objective!r}; only from {', '.join(SAMPLERS)}")
    return SAMPLERS[config.objective].from_config(config)
