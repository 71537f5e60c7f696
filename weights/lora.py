"""Low-rank adaptation (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1).

    W + alpha / rank * down up,    down [in, rank] random and up [rank, out] zero at the start

A run that trains such pairs has them as a part of their own, `params["lora"][<part>][<path of the module>]`, beside the
networks, whose kernels they are added to before these are applied: networks know nothing of them. A kernel of several
axes has its inputs in `down` and its outputs in `up`. A joint projection of queries, keys and values has a pair for
each of what it joins, stacked on a first axis, as projections that lie apart would; that of a gated feed-forward layer,
or of a transformer's modulation, has one pair, whose `down` is shared. A convolution has its window in `down`.

The kernels are those of dense layers of any number of axes and of convolutions that are not grouped.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from models.layers.dense import DenseParts

Tree = Any

LORA = "lora"  # among the parts of a run: its pairs

_LAYERS = nn.Dense | nn.DenseGeneral | DenseParts | nn.Conv


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that a pair can be added to.

    Attributes:
      shape: of it: inputs first, then what is joined if it is joint, then outputs.
      inputs: how many of its axes are inputs; of a convolution the window's too.
      joint: whether the axis behind the inputs counts projections, such as queries, that have a pair each.
      window: whether it is a convolution's.
    """

    shape: tuple[int, ...]
    inputs: int
    joint: bool = False
    window: bool = False

    def pair_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of its pair: down [in..., rank] and up [rank, out...], of a joint one with an axis before."""
        inputs, outputs = self.shape[: self.inputs], self.shape[self.inputs :]
        joined, outputs = (outputs[:1], outputs[1:]) if self.joint else ((), outputs)
        return {"down": (*joined, *inputs, rank), "up": (*joined, rank, *outputs)}


@functools.lru_cache(maxsize=16)
def kernels_of(model: nn.Module) -> dict[str, Kernel]:
    """The kernels of a network that pairs can be added to, by their paths, "block_0/attention/out/kernel".

    Found by tracing the network as it is initialized: nothing is allocated.
    """
    modules: dict[str, Any] = {}

    def note(call: Any, arguments: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, _LAYERS):
            modules["/".join(context.module.path)] = context.module
        return call(*arguments, **options)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    flat: dict[str, Any] = flatten_dict(shapes["params"], sep="/")
    kernels = {}
    for path, leaf in flat.items():
        module = modules.get(path.removesuffix("/kernel"))
        if module is None or not path.endswith("/kernel"):
            continue
        if isinstance(module, nn.Conv):
            if module.feature_group_count == 1:
                kernels[path] = Kernel(leaf.shape, leaf.ndim - 1, window=True)
        elif isinstance(module, nn.DenseGeneral | DenseParts):
            axes = module.axis if isinstance(module, nn.DenseGeneral) else -1
            axes = (axes,) if isinstance(axes, int) else axes
            # [..., number of projections, heads, width of a head]
            joint = not isinstance(module.features, int) and len(module.features) == 3
            kernels[path] = Kernel(leaf.shape, len(axes), joint)
        else:
            kernels[path] = Kernel(leaf.shape, 1)
    return kernels


def init_pairs(rng: Key[Array, ""], kernels: Mapping[str, Kernel], rank: int) -> Tree:
    """Pairs before the first update: {part: tree}, float32; their products are zero.

    `down` is uniform between -1 and 1 over the root of its inputs' number, as the peft library has it.

    Args:
      rng: each pair has a key of its own, by its path.
      kernels: by "<part>/<path of the module>/kernel".
      rank: of every pair.
    """
    pairs = {}
    for path, kernel in kernels.items():
        shapes = kernel.pair_shapes(rank)
        bound = math.prod(kernel.shape[: kernel.inputs]) ** -0.5
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        module = path.removesuffix("/kernel")
        pairs[f"{module}/down"] = jax.random.uniform(key, shapes["down"], jnp.float32, -bound, bound)
        pairs[f"{module}/up"] = jnp.zeros(shapes["up"], jnp.float32)
    return unflatten_dict(pairs, sep="/")


def path_matches(pattern: str, path: str) -> bool:
    """Whether a pattern of parameters is found in a path, "<part>/<path>".

    What is said of a network's part holds for its pairs too: theirs is also looked at without `LORA` before the part.
    """
    return any(re.search(pattern, each) for each in (path, path.removeprefix(f"{LORA}/")))


def scale_of(config: ConfigDict) -> float:
    """The factor of products, alpha / rank of a run's `config.lora`; an alpha of 0 stands for the rank."""
    return config.lora.alpha / config.lora.rank if config.lora.alpha else 1.0


def merge(params: Tree, scale: float) -> Tree:
    """Networks with their pairs added to their kernels, in the kernels' own dtypes.

    Args:
      params: {part: tree}, and the pairs under `LORA`, which may be of fewer or of more parts; without any, these are
        returned.
      scale: alpha / rank.
    """
    pairs: dict[str, Any] = flatten_dict(params.get(LORA, {}), sep="/")
    networks: dict[str, Any] = flatten_dict({part: tree for part, tree in params.items() if part != LORA}, sep="/")
    for path, down in pairs.items():
        module, _, side = path.rpartition("/")
        if side == "down" and (kernel := networks.get(f"{module}/kernel")) is not None:
            networks[f"{module}/kernel"] = _added(kernel, down, pairs[f"{module}/up"], scale)
    return unflatten_dict(networks, sep="/")


@functools.partial(jax.jit, static_argnames="scale")
def _added(kernel: Float[Array, "..."], down: Float[Array, "..."], up: Float[Array, "..."], scale: float) -> Array:
    """A kernel with scale * down up; see `Kernel.pair_shapes`."""
    # As exact on every device as the kernel itself: what is merged is to equal what is kept apart.
    product = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
    if down.ndim + up.ndim > kernel.ndim + 2:  # of what is joined, each
        product = jax.vmap(product, out_axes=down.ndim - 2)
    change = scale * product(down, up)
    return (kernel.astype(jnp.promote_types(kernel.dtype, change.dtype)) + change).astype(kernel.dtype)
