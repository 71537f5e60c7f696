"""A network's forward call as a program whose operations say which module they are of."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from ml_collections import ConfigDict

from models import create_model
from models.layers.dense import plain_layers

# Networks of any number of pixels, whose fields say no more of it than an example: they are described at the run's.
_ANY_SIZE = ("autoencoder_gumbel", "autoencoder_kl", "autoencoder_vq", "discriminator", "lpips")
# Networks of any number of tokens, which are their first input.
_ANY_LENGTH = ("captioner", "gpt2", "llama", "vision_adapter", "vision_prefix")
# Fields that say how a network computes, in the values that leave all modules in sight.
_PLAIN = {"scan": False, "remat": "none"}
_MARK, _JOIN = "module:", "|"  # of scopes


@dataclasses.dataclass(frozen=True)
class TracedNetwork:
    """One call of a network for one example, traced; nothing is allocated.

    Attributes:
      name: of the network, in `models.MODELS`.
      program: what it computes; its first inputs are parameters and other variables.
      inputs: name and shape, without the batch, of each of the others, such as ("conditioning.tokens", (77, 768)).
      outputs: shape of what each module that is called returns, by its path; the first dimension is the batch, of one,
        but for parameters that no input chooses from, such as positions.
      params: shapes of the parameters.
    """

    name: str
    program: Jaxpr
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: Mapping[str, tuple[int, ...]]
    params: Any


def trace_network(model: Mapping[str, Any], config: ConfigDict) -> TracedNetwork:
    """Traces a network.

    Args:
      model: {name, fields}, arguments of `models.create_model`.
      config: of the run that it is part of, which says how large pictures and how long texts are.
    """
    plain = {**model, **{key: value for key, value in _PLAIN.items() if key in model}}
    size = config.data.get("image_size", 0)
    if model["name"] in _ANY_SIZE and size:
        plain["image_size"] = size
    network = create_model(**plain)
    if "implementation" in network.__dataclass_fields__:
        network = network.clone(implementation="xla")  # a kernel hides its products
    inputs = _example(network, model["name"], config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(network.init, key, *network.example_inputs(1))
    outputs: dict[str, tuple[int, ...]] = {}

    def mark(method: Callable[..., Any], given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        # Flax's own scopes are of names alone, also where a module calls one that is deeper within another.
        path = context.module.path
        with jax.named_scope(_MARK + _JOIN.join(path)):
            made = method(*given, **named)
        leaves = [leaf for leaf in jax.tree.leaves(made) if hasattr(leaf, "shape")]
        if context.method_name != "setup" and leaves:
            outputs["/".join(path)] = tuple(leaves[0].shape)
        return made

    def call(variables: Any, inputs: Any) -> Any:
        with nn.intercept_methods(mark):
            return network.apply(variables, *inputs)

    with plain_layers():
        program = jax.make_jaxpr(call)(variables, inputs).jaxpr
    names = list(inspect.signature(network.__call__).parameters)
    named = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        rest = jax.tree_util.keystr(path[1:], simple=True, separator=".")
        named.append((".".join(filter(None, (names[path[0].idx], rest))), tuple(leaf.shape[1:])))
    return TracedNetwork(model["name"], program, tuple(named), outputs, variables["params"])


def path_of(scope: str) -> tuple[str, ...]:
    """The names that lead to the module that a scope of a traced network is of."""
    found = re.findall(rf"{_MARK}([^/()]*)", scope)
    return tuple(found[-1].split(_JOIN)) if found and found[-1] else ()


def _example(network: Any, name: str, config: ConfigDict) -> tuple[Any, ...]:
    """Shapes of an example's inputs, captions as long as the run's."""
    inputs, length = network.example_inputs(1), config.data.get("text_length", 0)
    if not length:
        return inputs
    if name == "captioner":
        length = min(length, network.length - network.prefix_length)  # its loss reads two tokens fewer
    if name in _ANY_LENGTH:
        return (jax.ShapeDtypeStruct((1, length), jnp.int32), *inputs[1:])
    if name in ("unet", "dit") and inputs[2].tokens is not None:
        tokens = jax.ShapeDtypeStruct((1, length, network.context_width), jnp.float32)
        return (*inputs[:2], inputs[2].replace(tokens=tokens))
    return inputs
