"""Matrix FLOPs of a traced program: multiplications and additions of its matmuls and convolutions."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from models import MODELS
from models.layers.dense import plain_layers


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Counts what one call of `function` does in matmuls and convolutions, a multiply-add as two.

    The program is traced, not compiled or run, so any size costs nothing. A scan counts as often as it iterates, a
    `while` loop once, and of a `cond` the dearer branch. What a Pallas kernel does inside is not seen: trace networks
    under `plain_config`. Layers that one CPU computes with fewer (`models.layers.convolution`) count as elsewhere.

    Args:
      function: traceable.
      *arguments: arrays or ShapeDtypeStructs.
    """
    with plain_layers():
        program = jax.make_jaxpr(function)(*arguments).jaxpr
    return sum(scoped_matrix_flops(program).values())


def scoped_matrix_flops(program: Jaxpr) -> dict[str, int]:
    """As `matrix_flops` of a traced program, by the named scope of operations, in the order in which they are entered.

    Flax puts each call of a module in a scope of its name within that of its parent, as `UViT/mid_block/mlp/up`, or of
    the name and a method, as `mid_block._add_mlp`. Scopes without a product are there too, with 0.
    """
    return _count(program)


def plain_config(config: ConfigDict, recompute: bool = True) -> ConfigDict:
    """A copy of an experiment whose networks have their products in sight of `matrix_flops`.

    Networks with an `implementation` use the plain one, which multiplies all pairs of positions, also those that a mask
    hides and a fused kernel may pass over.

    Args:
      config: the experiment.
      recompute: False also switches off `remat` and microbatches, which may do products a second time to save memory:
        what is left is what the step's mathematics asks for.
    """
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        for network in (*plain.models.values(), *plain.frozen.values()):
            if "implementation" in MODELS[network.name].__dataclass_fields__:
                network.implementation = "xla"
            if "remat" in network and not recompute:
                network.remat = "none"
        if not recompute:
            plain.mesh.microbatches = 1
    return plain


def _count(jaxpr: Jaxpr, within: str = "") -> dict[str, int]:
    totals: dict[str, int] = {}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        scope = f"{within}/{equation.source_info.name_stack}"
        total, inner = 0, {}
        if name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = _shape(equation.invars[0])
            total = 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracting)
        elif name == "conv_general_dilated":
            # Each output value sums over the kernel: its size without the output features.
            kernel = _shape(equation.invars[1])
            features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total = 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // features
        elif name == "cond":
            branches = [_count(branch.jaxpr, scope) for branch in equation.params["branches"]]
            inner = max(branches, key=lambda counted: sum(counted.values()))
        else:
            times = equation.params["length"] if name == "scan" else 1
            for program in inner_programs(equation.params):
                for inner_scope, count in _count(program, scope).items():
                    inner[inner_scope] = inner.get(inner_scope, 0) + times * count
        for key, count in ({scope: total} | inner).items():
            totals[key] = totals.get(key, 0) + count
    return totals


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def inner_programs(parameters: dict[str, Any]) -> list[Jaxpr]:
    """Programs that an equation holds: of jit, scan, remat, custom derivatives."""
    programs = []
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                programs.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                programs.append(item)
    return programs
