"""Other projects' layouts of a network: its tensors by name, from a table of our parameters' paths, in both directions.

A table is read from top to bottom; the first rule that matches a path says what its values are called elsewhere and how
they are arranged. Both directions follow from the same rule, so that what is written can be read.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cli.errors import UserError
from weights.files.tensors import Deferred, Tensors

Tree = Any

# What a network makes of fields that it cannot be built with.
_UNFIT = (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError, MemoryError)
_SHOWN = 8  # names of a kind in an error

# Our names of a module's leaves -> PyTorch's.
TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class Form:
    """How the values of one of our arrays are arranged elsewhere.

    Attributes:
      outward: our array -> theirs.
      inward: (their array, our shape) -> ours.
    """

    outward: Callable[[np.ndarray], np.ndarray]
    inward: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def linear(inputs: int = 1) -> Form:
    """A dense layer's kernel, whose first `inputs` axes are inputs [in..., out...] <-> a matrix [out, in]."""
    return Form(
        outward=lambda array: array.reshape(int(np.prod(array.shape[:inputs])), -1).T,
        inward=lambda array, shape: array.T.reshape(shape),
    )


def pointwise(inputs: int = 1) -> Form:
    """The same <-> a convolution of single pixels [out, in, 1, 1]."""
    dense = linear(inputs)
    return Form(
        outward=lambda array: dense.outward(array)[..., None, None],
        inward=lambda array, shape: dense.inward(array.reshape(array.shape[:2]), shape),
    )


SAME = Form(outward=lambda array: array, inward=lambda array, shape: array)
LINEAR = linear()
FLAT = Form(outward=lambda array: array.reshape(-1), inward=lambda array, shape: array.reshape(shape))
# [height, width, in, out], or the matrix [in, out] of a 1x1 convolution <-> [out, in, height, width].
CONVOLUTION = Form(
    outward=lambda array: (array if array.ndim == 4 else array[None, None]).transpose(3, 2, 0, 1),
    inward=lambda array, shape: array.transpose(2, 3, 1, 0).reshape(shape),
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where some of our parameters are found elsewhere.

    Attributes:
      path: a regular expression of the whole path of a leaf, "image/blocks_0/mlp/up/kernel".
      names: what it is called there: a template of `re.Match.expand`, or a function of the match. A last part that is
        one of our leaf names is translated. Several names hold what lies apart on one axis here: query, key and value.
      kernel: the form of a leaf called "kernel", or of each of its names; a bias is flat there.
      other: the form of anything else.
      axis: what several names lie apart on, from the end: the third.
    """

    path: str
    names: str | tuple[str, ...] | Callable[[re.Match[str]], str | tuple[str, ...]]
    kernel: Form | tuple[Form, ...] = LINEAR
    other: Form = SAME
    axis: int = 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """A network's tensors as another project names and arranges them.

    Attributes:
      what: names the weights in errors, as in "the weights of ...".
      rules: the table.
      leaves: our names of leaves -> theirs.
      ignored: a regular expression of whole names of theirs that hold nothing learned.
    """

    what: str
    rules: tuple[Rule, ...]
    leaves: Mapping[str, str] = dataclasses.field(default_factory=lambda: TORCH_LEAVES)
    ignored: str = r"(?!)"

    def read(self, model: Any, tensors: Mapping[str, Any]) -> dict[str, Tree]:
        """Converts tensors to the variables of `model`, in its own dtypes.

        Args:
          model: a Linen module with `example_inputs`; says what is expected.
          tensors: theirs, by name; arrays, or `Deferred`.

        Returns:
          {collection: tree}: "params", and "batch_stats" if there are any.

        Raises:
          UserError: if tensors are missing, unexpected or of another shape; lists all of them.
        """
        return jax.tree.map(lambda leaf: jnp.array(leaf.make(), leaf.dtype), self.read_deferred(model, tensors))

    def read_deferred(self, model: Any, tensors: Mapping[str, Any]) -> dict[str, Tree]:
        """As `read`, of a network that need not fit the memory: leaves are `Deferred`, tensors may be."""
        expected = model_shapes(model)
        places = {path: self._find(path) for path in expected}
        wanted: dict[str, tuple[int, ...]] = {}
        for path, leaf in expected.items():
            # An array without memory: only the shapes of what it becomes are wanted.
            outward = _separated(np.broadcast_to(np.zeros((), np.float32), leaf.shape), places[path])
            wanted |= {
                name: form.outward(array).shape for (name, form), array in zip(places[path].parts, outward, strict=True)
            }
        given = {name: array for name, array in tensors.items() if not re.fullmatch(self.ignored, name)}
        check_tensors(self.what, wanted, {name: tuple(array.shape) for name, array in given.items()})

        def make(path: str) -> np.ndarray:
            shape, place = expected[path].shape, places[path]
            if len(place.parts) == 1:
                ((name, form),) = place.parts
                return form.inward(np.asarray(given[name]), shape)
            axis = len(shape) - place.axis
            shape = shape[:axis] + shape[axis + 1 :]
            return np.stack([form.inward(np.asarray(given[name]), shape) for name, form in place.parts], axis=axis)

        return unflatten_dict(
            {
                tuple(path.split("/")): Deferred(leaf.shape, leaf.dtype, functools.partial(make, path))
                for path, leaf in expected.items()
            }
        )

    def write(self, variables: Mapping[str, Tree]) -> Tensors:
        """Converts {collection: tree} to tensors of float32, by their names.

        Raises:
          UserError: if this layout has no place for some of them.
        """
        tensors = self.write_deferred(variables)
        # Copies, writable and not views of ours.
        return {name: np.array(tensor.make(), np.float32, order="C") for name, tensor in tensors.items()}

    def write_deferred(self, variables: Mapping[str, Tree]) -> dict[str, Deferred]:
        """As `write`, one by one and in the dtypes that they have."""
        tensors: dict[str, Deferred] = {}

        def make(value: Any, place: _Place, index: int) -> np.ndarray:
            return place.parts[index][1].outward(_separated(np.asarray(value), place)[index])

        for path, value in _by_path(variables).items():
            place = self._find(path)
            like = _separated(np.broadcast_to(np.zeros((), np.float32), value.shape), place)
            for index, ((name, form), part) in enumerate(zip(place.parts, like, strict=True)):
                shape = form.outward(part).shape
                tensors[name] = Deferred(shape, value.dtype, functools.partial(make, value, place, index))
        return tensors

    def names(self, path: str) -> tuple[str, ...]:
        """What the parameter at a path, "block_0/attention/out/kernel", is called: several where it lies apart.

        Raises:
          UserError: if this layout has no place for it.
        """
        return tuple(name for name, _ in self._find(f"params/{path}").parts)

    def _find(self, path: str) -> "_Place":
        """Where the leaf at "collection/module/.../leaf" is."""
        leaf = path.rpartition("/")[2]
        for rule in self.rules:
            if match := re.fullmatch(rule.path, path.partition("/")[2]):
                templates = rule.names(match) if callable(rule.names) else rule.names
                templates = (templates,) if isinstance(templates, str) else templates
                form = {"kernel": rule.kernel, "bias": FLAT}.get(leaf, rule.other)
                forms = form if isinstance(form, tuple) else (form,) * len(templates)
                names = (self._translated(match.expand(template)) for template in templates)
                return _Place(tuple(zip(names, forms, strict=True)), rule.axis)
        raise UserError(f"the layout of {self.what} has no place for {path}; convert to another one")

    def _translated(self, name: str) -> str:
        head, dot, leaf = name.rpartition(".")
        return head + dot + self.leaves.get(leaf, leaf) if dot else name


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one of our leaves is: (name, form) of each part of it, which lie apart on an axis from the end."""

    parts: tuple[tuple[str, Form], ...]
    axis: int


def check_tensors(what: str, wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names and shapes.

    Args:
      what: names the weights in the error.
      wanted: name -> shape.
      given: name -> shape.

    Raises:
      UserError: if any differ; lists what is missing, unexpected or of another shape.
    """
    shapes = [
        f"{name} is {given[name]}, expected {wanted[name]}"
        for name in sorted(wanted.keys() & given.keys())
        if given[name] != wanted[name]
    ]
    kinds = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another shape": shapes,
    }
    problems = [f"{kind}: {_some(lines)}" for kind, lines in kinds.items() if lines]
    if problems:
        # One name that ends like a single missing one says nothing of a prefix of all.
        several = len(kinds["missing"]) > 1
        wrapped = {name.removesuffix(kinds["missing"][0]) for name in kinds["unexpected"]} if several else set()
        for prefix in sorted(prefix for prefix in wrapped if prefix.endswith(".")):
            if all(f"{prefix}{name}" in given for name in kinds["missing"]):
                problems.append(f"they are there under {prefix!r}: save those alone, without that prefix")
        raise UserError(f"these are not the weights of {what}; {'; '.join(problems)}")


def _some(lines: list[str]) -> str:
    """What fits a line: another network has hundreds of other names."""
    return ", ".join(lines[:_SHOWN]) + (f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")


def model_shapes(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a network's variables by "collection/path", without allocating them.

    Raises:
      UserError: if a field has a value that the network cannot be built with.
    """
    try:
        return dict(_traced_shapes(model))
    except _UNFIT as error:
        said = str(error).strip() or type(error).__name__
        raise UserError(f"this network cannot be built: {said.splitlines()[0]}") from error


@functools.lru_cache(maxsize=16)
def _traced_shapes(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return _by_path(jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1)))


def _by_path(tree: Mapping[str, Tree]) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in flatten_dict(dict(tree)).items()}


def _separated(array: np.ndarray, place: _Place) -> list[np.ndarray]:
    """Takes an axis apart where values have several names."""
    return [array] if len(place.parts) == 1 else list(np.moveaxis(array, array.ndim - place.axis, 0))
