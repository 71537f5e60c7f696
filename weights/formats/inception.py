"""Inception-v3 of the Frechet Inception distance: the published PyTorch conversion to our parameters, and back.

The conversion (`pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, `weights-inception-2015-12-05-6726825d.pth` of
torch-fidelity: the same names and values) calls a tensor `Mixed_5b.branch1x1.conv.weight`, kernels [out, in, height,
width]. Ours is `Mixed_5b/branch1x1/conv/kernel`, [height, width, in, out]. `bn.num_batches_tracked`, which counts
training steps, may be there or not and means nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from models.inception import Inception
from weights.files.layout import check_tensors
from weights.files.tensors import Tensors

_COUNTER = "num_batches_tracked"
_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def from_torch(model: Inception, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts the state dict to {"params": tree, "batch_stats": tree} of `model`, in its `param_dtype`.

    Args:
      model: says what shapes are expected.
      tensors: the state dict as numpy arrays, as `weights.files.tensors.read_tensors` gives it.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    expected = _shapes(model)
    names = {_torch_name(path): path for path in expected}
    given = {name: array for name, array in tensors.items() if name.rpartition(".")[2] != _COUNTER}

    wanted = {name: _torch_shape(expected[path]) for name, path in names.items()}
    what = "the Inception network of the distance"
    check_tensors(what, wanted, {name: tuple(array.shape) for name, array in given.items()})

    arrays = {}
    for name, path in names.items():
        array = np.asarray(given[name])
        order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]
        arrays[path] = jnp.asarray(array.transpose(order), model.param_dtype)
    return unflatten_dict(arrays)


def to_torch(variables: Mapping[str, Any]) -> Tensors:
    """Converts {"params": tree, "batch_stats": tree} to a state dict of float32 arrays, with the counters at 0."""
    state = {}
    for path, value in flatten_dict(dict(variables)).items():
        array = np.asarray(value, np.float32)
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
        name = _torch_name(path)
        state[name] = np.array(array.transpose(order), order="C")  # a copy, writable and not a view of ours
        if name.endswith("running_var"):
            state[name.replace("running_var", _COUNTER)] = np.zeros((), np.int64)
    return state


def _shapes(model: Inception) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of the model's variables by path, without allocating them."""
    variables = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    leaves: dict[Any, Any] = flatten_dict(dict(variables))
    return {path: leaf.shape for path, leaf in leaves.items()}


def _torch_name(path: tuple[str, ...]) -> str:
    """The published name of a path that begins with its collection."""
    collection, *modules, leaf = path
    return "fc.bias" if leaf == "fc_bias" else ".".join((*modules, _LEAVES[collection, leaf]))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[height, width, in, out] -> [out, in, height, width], [in, out] -> [out, in]."""
    return (shape[-1], shape[-2], *shape[:-2]) if len(shape) > 1 else shape
