"""The discrete VAE of the DALL-E package (github.com/openai/DALL-E): state dicts to our parameters, and back.

The package stores encoder and decoder apart; a tensor is `blocks.group_1.block_2.res_path.conv_3.w` (or `.b`), kernels
[out, in, height, width]. Ours is `encoder/group_1_block_2/conv_3/kernel`, [height, width, in, out]; the decoder's
first 1x1 convolution is a matrix [in, out] here, since it is also used as a lookup table.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cli.errors import UserError
from models.dvae import DiscreteVAE

Tensors = dict[str, np.ndarray]


def from_dall_e(
    model: DiscreteVAE, encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Converts the package's state dicts to the parameters of `model`, in its `param_dtype`.

    Args:
      model: says what shapes are expected.
      encoder: state dict of the encoder, as numpy arrays.
      decoder: state dict of the decoder, as numpy arrays.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    expected = _shapes(model)
    given = {f"encoder.{name}": array for name, array in encoder.items()}
    given |= {f"decoder.{name}": array for name, array in decoder.items()}
    names = {_official_name(path): path for path in expected}
    wanted = {name: _official_shape(expected[path]) for name, path in names.items()}

    problems = []
    if missing := sorted(wanted.keys() - given.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected := sorted(given.keys() - wanted.keys()):
        problems.append(f"unexpected: {', '.join(unexpected)}")
    shapes = [
        f"{name} is {tuple(given[name].shape)}, expected {wanted[name]}"
        for name in sorted(wanted.keys() & given.keys())
        if tuple(given[name].shape) != wanted[name]
    ]
    if shapes:
        problems.append(f"of another shape: {', '.join(shapes)}")
    if problems:
        raise UserError(f"these are not the weights of this discrete VAE; {'; '.join(problems)}")

    arrays = {}
    for name, path in names.items():
        array = np.asarray(given[name])
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        arrays[path] = jnp.asarray(array.reshape(expected[path]), model.param_dtype)
    return unflatten_dict(arrays)


def to_dall_e(params: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    """Converts parameters to the package's (encoder, decoder) state dicts of float32 numpy arrays."""
    state: dict[str, Tensors] = {"encoder": {}, "decoder": {}}
    for path, value in flatten_dict(dict(params)).items():
        side, name = _official_name(path).split(".", 1)
        array = np.asarray(value, np.float32)
        if array.ndim == 2:
            array = array[None, None]
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        state[side][name] = np.array(array, order="C")  # a copy, writable and not a view of ours
    return state["encoder"], state["decoder"]


def _shapes(model: DiscreteVAE) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of the model's parameters by path, without allocating them."""
    variables = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    leaves: dict[Any, Any] = flatten_dict(variables["params"])
    return {path: leaf.shape for path, leaf in leaves.items()}


def _official_name(path: tuple[str, ...]) -> str:
    """The package's name of a path, `encoder.blocks.group_1...w`, behind the network it belongs to."""
    side, *modules, leaf = path
    names = [side, "blocks"]
    for module in modules:
        if group := re.fullmatch(r"(group_\d+)_(block_\d+)", module):
            names.extend(group.groups())
        elif module == "output":
            names.extend(("output", "conv"))
        elif module.startswith("conv_"):
            names.extend(("res_path", module))
        else:
            names.append(module)
    return ".".join([*names, {"kernel": "w", "bias": "b"}[leaf]])


def _official_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[height, width, in, out] or [in, out] -> [out, in, height, width]; a bias is the same in both."""
    if len(shape) == 1:
        return shape
    height, width = shape[:2] if len(shape) == 4 else (1, 1)
    return (shape[-1], shape[-2], height, width)
