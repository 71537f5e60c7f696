"""What tells the weights of a network from all others, wherever they lie."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from models import create_model
from weights.sources import Part, differing_fields

Tree = Any

# Fields of networks that change neither their outputs nor their roundings.
_SAME_OUTPUTS = {"implementation", "scan", "remat", "dropout", "logit_scale_init", "name", "parent"}
# Of a first stage, what plays no part in the latents that it makes; and fields that decide no more of them. The same of
# a captioner, with those that make other prefixes than of latents.
_DECODES = ("decoder", "post_quant", "codebook")
_DECODING = ("image_size", "vocab_size")
_WRITES = ("decode_prefix", "language")
_WRITING = (
    *("text_vocab_size", "length", "width", "depth", "heads", "mlp_hidden", "activation", "text_end_id"),
    *("mapper_states", "mapper_depth", "mapper_heads"),
)


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


def differing_networks(theirs: dict[str, Any], ours: dict[str, Any], latents: bool = False) -> list[str]:
    """What `differing` says of the fields of two networks, {name, fields}, whose weights nobody need read for that."""
    return differing_fields(theirs, ours, _read_back(ours)[1] if latents else ())


def differing(theirs: Part, ours: Part, latents: bool = False) -> list[str]:
    """Says what one part computes otherwise than another: fields as `differing_fields` does, or "other weights".

    Weights are the same that differ by what half precision drops: one folder may keep more of them than the other.

    Args:
      theirs: the one.
      ours: the other.
      latents: of two first stages, or two captioners, whether their latents alone count, and not what is made of those.
    """
    if fields := differing_networks(theirs.model, ours.model, latents):
        return fields
    idle = _read_back(ours.model)[0] if latents else ()
    leaves = []
    for part in (theirs, ours):
        measured = getattr(create_model(**part.model), "latent_scale", None) is None
        trees = {"params": part.params, **(part.variables if measured else {})}
        flat: dict[tuple[str, ...], Any] = flatten_dict(trees)
        leaves.append({path: leaf for path, leaf in flat.items() if path[1] not in idle})
    same = leaves[0].keys() == leaves[1].keys() and all(_as_stored(leaf, leaves[1][p]) for p, leaf in leaves[0].items())
    return [] if same else ["other weights"]


def same_leaves(ours: Tree, theirs: Tree) -> bool:
    """Whether two trees are equal to the bit."""
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        return False
    return all(map(np.array_equal, *(map(jax.device_get, jax.tree.leaves(tree)) for tree in (ours, theirs))))


def _read_back(model: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What reads a network's latents back: (modules, fields)."""
    return (_WRITES, _WRITING) if model["name"] == "captioner" else (_DECODES, _DECODING)


def _as_stored(a: Any, b: Any) -> bool:
    """Whether two arrays are equal, perhaps after one of the roundings that weights are stored with."""
    one, other = jax.device_get(a), jax.device_get(b)
    if one.shape != other.shape:
        return False
    with np.errstate(over="ignore"):
        kinds = (np.float32, np.float16, jnp.bfloat16)
        return any(np.array_equal(one.astype(kind), other.astype(kind)) for kind in kinds)
