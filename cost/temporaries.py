"""How much memory a traced program needs for what it computes on the way: an estimate, made without a compiler.

XLA's CPU compiler cannot be asked on behalf of a GPU: it computes bfloat16 in float32, takes recomputation
(`jax.checkpoint`) out again where layers stand one by one, and takes minutes for a large network. So the traced program
is walked in its own order, and what is alive at once is added up, under a plain model of what a compiler fuses.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal

from cost.flops import inner_programs

# XLA's CPU compiler planned 0.9 to 1.8 times what the walk adds up, for the networks that docs/tpu.md names.
MARGIN = 1.25
# The estimate is held within this factor of the compiler's figure by the tests.
FACTOR = 1.5

Split = Callable[[tuple[int, ...]], int]

# The same memory under another shape; a matrix product reads a transposed operand as it is.
_VIEWS = {
    *("reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p", "sharding_constraint", "stop_gradient"),
    *("reduce_precision", "bitcast_convert_type", "optimization_barrier", "name"),
}
# What reads its operands as they are made, and so needs none of them in memory.
_REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"),
}
# What has to find its operands in memory. All else is one loop over its result, which can be part of another one.
_OPAQUE = {
    *("dot_general", "conv_general_dilated", "scan", "while", "cond", "sort", "top_k", "cumsum", "cumprod", "cummax"),
    *("cumlogsumexp", "scatter", "scatter-add", "scatter_add", "select_and_scatter_add", "reduce_window_max"),
    *("reduce_window_sum", "reduce_window", "random_bits", "threefry2x32", "pallas_call", "custom_call", "fft", "eigh"),
    *("cholesky", "triangular_solve", "pure_callback", "io_callback", "shard_map", "ffi_call", "qr", "svd"),
}
# What is not computed a second time to spare memory.
_EXPENSIVE = {
    *("exp", "exp2", "expm1", "log", "log1p", "tanh", "erf", "erfc", "erf_inv", "logistic", "pow", "sin", "cos"),
    *("lgamma", "digamma"),
}
_LOOPS = ("scan", "while", "cond")


@dataclasses.dataclass
class _Value:
    """An array of the program.

    Attributes:
      size: bytes of it on a device; 0 for arguments and constants, which are counted elsewhere.
      roots: numbers of the values in memory that it is read from: itself, unless it is fused away or a view.
      expensive: whether reading it computes something expensive.
    """

    size: int
    roots: frozenset[int]
    expensive: bool = False


@dataclasses.dataclass
class _Operation:
    """An equation, with calls put in its place.

    Attributes:
      name: of the primitive.
      inputs: numbers of values.
      outputs: numbers of values.
      within: bytes that it needs while it runs, beside its inputs and outputs.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    within: int


def temporary_bytes(
    function: Callable[..., Any], *arguments: Any, split: Split = lambda shape: 1, fused_attention: bool = False
) -> int:
    """Bytes that one call of `function` holds at most beside its arguments and results; nothing is compiled or run.

    The model: matrix products, convolutions, scans, sorts and reductions write their result to memory; so does any
    other operation whose result one of the first three reads. Element-wise work is fused into what reads it, if only
    one operation does, or if what it is made from takes no more memory than itself. A fused loop may overwrite
    an operand that nobody needs any more. Results of the program take the place of donated arguments.

    What a compiler loses or gains by another choice is in it as a factor, `MARGIN`; the work space of kernels is not.

    Args:
      function: traceable.
      *arguments: arrays or ShapeDtypeStructs.
      split: over how many devices a value of some shape is divided.
      fused_attention: attention without a mask, in half precision, does not write its scores, as cuDNN's kernel.
    """
    return program_temporary_bytes(jax.make_jaxpr(function)(*arguments).jaxpr, split, fused_attention)


def program_temporary_bytes(program: Jaxpr, split: Split = lambda shape: 1, fused_attention: bool = False) -> int:
    """`temporary_bytes` of a program that was traced already."""
    hidden = _score_shapes(program) if fused_attention else frozenset()
    return round(MARGIN * _Walk(split, hidden).peak(program, sliced=0))


class _Walk:
    """One program, flattened; bodies of loops are walks of their own."""

    def __init__(self, split: Split, hidden: frozenset[tuple[int, ...]]):
        self.split, self.hidden = split, hidden
        self.values: list[_Value] = []
        self.operations: list[_Operation] = []

    def peak(self, program: Jaxpr, sliced: int) -> int:
        """Bytes at the fullest moment.

        Args:
          program: to walk.
          sliced: how many of its last arguments are cut out of larger ones, as each turn of a scan does.
        """
        names: dict[Any, int] = {}
        arguments = [*program.constvars, *program.invars]
        for place, variable in enumerate(arguments):
            held = place < len(arguments) - sliced
            names[variable] = self._add(0 if held else self._size(variable))
        first = [names[variable] for variable in arguments[len(arguments) - sliced :]]
        self._flatten(program, names)
        outputs = [names[variable] for variable in program.outvars if not isinstance(variable, Literal)]
        return self._sweep(first, outputs)

    def _add(self, size: int) -> int:
        self.values.append(_Value(size, frozenset({len(self.values)})))
        return len(self.values) - 1

    def _size(self, variable: Any, scope: str = "") -> int:
        aval = variable.aval
        shape = getattr(aval, "shape", None)
        if shape is None or ("attention_xla" in scope and shape in self.hidden):
            return 0
        itemsize = getattr(aval.dtype, "itemsize", 8)  # a key of random numbers has none
        return math.prod(shape) * itemsize // self.split(shape)

    def _flatten(self, program: Jaxpr, names: dict[Any, int], within: str = "") -> None:
        """Puts the equations of a program, and of what it calls, into `operations`."""

        def number(variable: Any) -> int:
            if isinstance(variable, Literal):
                return self._add(0)
            return names[variable]

        for equation in program.eqns:
            scope = f"{within}/{equation.source_info.name_stack}"
            name = equation.primitive.name
            inputs = [number(variable) for variable in equation.invars]
            inner = inner_programs(equation.params)
            if inner and name not in (*_LOOPS, "pallas_call") and len(inner[0].invars) == len(inputs):
                called = inner[0]
                if name in ("remat2", "remat", "checkpoint"):  # a barrier keeps what it is given in memory
                    barred = [self._add(self.values[each].size) for each in inputs]
                    self.operations.append(_Operation("optimization_barrier", tuple(inputs), tuple(barred), 0))
                    inputs = barred
                local = dict(zip(called.invars, inputs, strict=True))
                local |= {variable: self._add(0) for variable in called.constvars}
                self._flatten(called, local, scope)
                for outer, result in zip(equation.outvars, called.outvars, strict=True):
                    names[outer] = self._add(0) if isinstance(result, Literal) else local[result]
                continue
            outputs = [self._add(self._size(variable, scope)) for variable in equation.outvars]
            names.update(zip(equation.outvars, outputs, strict=True))
            self.operations.append(
                _Operation(name, tuple(inputs), tuple(outputs), self._loop_bytes(name, equation.params, inner))
            )

    def _loop_bytes(self, name: str, parameters: dict[str, Any], inner: Sequence[Jaxpr]) -> int:
        """What a turn of a loop, or the largest branch, needs."""
        if name not in _LOOPS:
            return 0
        sliced = 0
        if name == "scan":
            sliced = len(inner[0].invars) - parameters["num_consts"] - parameters["num_carry"]
        return max(_Walk(self.split, self.hidden).peak(program, sliced) for program in inner)

    def _sweep(self, first: list[int], outputs: list[int]) -> int:
        """Goes through the operations in their order.

        Args:
          first: values that are there from the beginning.
          outputs: the program's results.
        """
        needed = self._needed(outputs)
        steps = list(self._executed(needed, set(outputs)))
        last = {root: step for step, (_, reads, _) in enumerate(steps) for root in reads}
        ends: dict[int, list[int]] = {}
        for root, step in last.items():
            ends.setdefault(step, []).append(root)
        alive = {value for value in first if value in last}
        total = sum(self.values[value].size for value in alive)
        most = total
        for step, (operation, _, writes) in enumerate(steps):
            ended = [root for root in ends.get(step, ()) if root in alive]
            freed = sum(self.values[root].size for root in ended)
            in_place = operation.name not in _OPAQUE | _REDUCTIONS
            made = sum(self.values[value].size for value in writes)
            most = max(most, total + made + operation.within - (freed if in_place else 0))
            alive |= {value for value in writes if value in last}
            total += sum(self.values[value].size for value in writes if value in last) - freed
            alive -= set(ended)
        return most

    def _needed(self, outputs: list[int]) -> list[_Operation]:
        """The operations whose results matter."""
        wanted, kept = set(outputs), []
        for operation in reversed(self.operations):
            if wanted.intersection(operation.outputs):
                wanted.update(operation.inputs)
                kept.append(operation)
        return kept[::-1]

    def _executed(
        self, operations: list[_Operation], outputs: set[int]
    ) -> Iterator[tuple[_Operation, frozenset[int], list[int]]]:
        """Operations that run as a loop or kernel: (operation, values in memory that it reads, values that it writes).

        Args:
          operations: those that matter.
          outputs: results of the program, which have their own place.
        """
        uses: dict[int, int] = {}
        forced: set[int] = set()  # what has to be in memory
        for operation in reversed(operations):
            is_view = operation.name in _VIEWS
            for place, value in enumerate(operation.inputs):
                uses[value] = uses.get(value, 0) + 1
                barred = operation.name == "optimization_barrier"
                if operation.name in _OPAQUE or barred or (is_view and operation.outputs[place] in forced):
                    forced.add(value)
        for operation in operations:
            reads = frozenset().union(*(self.values[value].roots for value in operation.inputs))
            if operation.name in _VIEWS and not outputs.intersection(operation.outputs):
                for value, source in zip(operation.outputs, operation.inputs, strict=True):
                    self.values[value].roots = self.values[source].roots
                    self.values[value].expensive = self.values[source].expensive
                continue
            if operation.name not in _OPAQUE | _REDUCTIONS and not outputs.intersection(operation.outputs):
                sources = sum(self.values[root].size for root in reads)
                expensive = operation.name in _EXPENSIVE or any(
                    self.values[each].expensive for each in operation.inputs
                )
                if all(
                    value not in forced
                    and (uses.get(value, 0) <= 1 or (sources <= 1.05 * self.values[value].size and not expensive))
                    for value in operation.outputs
                ):
                    for value in operation.outputs:
                        self.values[value].roots, self.values[value].expensive = reads, expensive
                    continue
            elif operation.name not in _OPAQUE:
                for value in outputs.intersection(operation.outputs):
                    self.values[value].size = 0
            yield operation, reads, list(operation.outputs)


def _score_shapes(program: Jaxpr) -> frozenset[tuple[int, ...]]:
    """Shapes of scores that cuDNN's kernel would keep to itself, see `models.layers.attention_choice`.

    Of a mask the program does not say what kind it is, so that attention with one is left out.
    """
    scores: set[tuple[int, ...]] = set()
    written: set[tuple[int, ...]] = set()

    def look(program: Jaxpr, within: str) -> None:
        for equation in program.eqns:
            scope = f"{within}/{equation.source_info.name_stack}"
            if "attention_xla" in scope:
                operand: Any = equation.invars[0].aval
                result: Any = equation.outvars[0].aval
                shape = result.shape
                name, itemsize = equation.primitive.name, getattr(operand.dtype, "itemsize", 4)
                if name == "dot_general" and itemsize == 2 and result.dtype.itemsize == 4:
                    (axes, _), _ = equation.params["dimension_numbers"]
                    width = math.prod(operand.shape[axis] for axis in axes)
                    (scores if width % 8 == 0 and width <= 128 else written).add(shape)
                elif name == "add" and len(shape) >= 4:
                    written.add(shape)
            for inner in inner_programs(equation.params):
                look(inner, scope)

    look(program, "")
    return frozenset(scores - written)
