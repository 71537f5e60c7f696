"""What tells the weights of a network from all others, wherever they lie."""

import hashlib
import json

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from models import create_model
from weights.sources import Part

# Fields of networks that change neither their outputs nor their roundings.
_SAME_OUTPUTS = {"implementation", "scan", "remat", "dropout", "logit_scale_init", "name", "parent"}


def fingerprint(part: Part) -> str:
    """SHA-256 of a network with its weights: two parts that have it in common compute the same.

    Of the network, every field that its outputs depend on counts, also those with their defaults, and `dtype`.
    """
    network = create_model(**part.model)
    fields = {name: str(getattr(network, name)) for name in network.__dataclass_fields__ if name not in _SAME_OUTPUTS}
    digest = hashlib.sha256(json.dumps([part.model["name"], fields], sort_keys=True).encode())
    for path, leaf in sorted(flatten_dict(part.trees(), sep="/").items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
