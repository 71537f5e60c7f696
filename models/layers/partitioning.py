"""Where activations lie on the devices of the mesh in context (`jax.set_mesh`).

The axes are those of the design: a batch is split over `data` and `fsdp`, heads over `tensor`. Without a mesh that has
them, as on one device or when sampling, nothing here changes anything.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float, Shaped

ROW_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)


def shard_rows(x: Shaped[Array, "b *rest"], whole: bool = False) -> Shaped[Array, "b *rest"]:
    """Splits the leading dimension over `data` and `fsdp`; how the other dimensions lie is left to the compiler.

    A network does this to its residual stream. Parameters that are split over `fsdp` are then gathered where they are
    used; unconstrained, the compiler may instead spread the activations over the width and exchange these.

    Args:
      x: activations.
      whole: the other dimensions are whole on every device, as their gradients are. Where one vector [b d] goes into
        several layers whose kernels are split over all three axes, XLA of jax 0.10 adds their gradients up wrongly if
        it is left free to split d.

    Returns:
      x, as it was where there is no such mesh or where the batch does not divide over it.
    """
    mesh = _mesh_in_context(ROW_AXES)
    axes = _dividing(mesh, ROW_AXES, x.shape[0])
    if mesh is None or axes is None:
        return x
    rest = () if whole else (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *rest))


def split_rows(x: Shaped[Array, "b *rest"], parts: int) -> Shaped[Array, "{parts} b2 *rest"]:
    """Takes a batch apart: every `parts`-th row together, so that each device has its share of a part already.

    Args:
      x: a batch, which `parts` divides; where parts do not divide over the devices, the compiler chooses how they lie.
      parts: how many.
    """
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    mesh = _mesh_in_context(ROW_AXES)
    axes = _dividing(mesh, ROW_AXES, x.shape[1])
    return x if axes is None else jax.lax.with_sharding_constraint(x, PartitionSpec(None, axes))


def join_rows(x: Shaped[Array, "parts b *rest"]) -> Shaped[Array, "b2 *rest"]:
    """The batch that `split_rows` took apart, its rows in the order they had."""
    return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def map_rows_and_heads(function: Callable[..., Array], *arrays: Shaped[Array, "b _ _ _"]) -> Float[Array, "b _ n _"]:
    """Calls `function` on each device's own rows and heads, for what the compiler cannot split: a Pallas kernel.

    A dimension that does not divide over its axes is whole on every device, which then all do the same work.

    Args:
      function: from arrays [b l n k] to one such array; rows and heads do not depend on each other.
      *arrays: its arguments, of one batch, and of one number of heads or 1, which is for all heads. The result is
        split as the first one.
    """
    mesh = _mesh_in_context(ROW_AXES + HEAD_AXES)
    if mesh is None:
        return function(*arrays)
    specs = tuple(
        PartitionSpec(_dividing(mesh, ROW_AXES, x.shape[0]), None, _dividing(mesh, HEAD_AXES, x.shape[2]), None)
        for x in arrays
    )
    # A Pallas call does not say over which axes its results vary, so that cannot be checked.
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def device_platform() -> str:
    """The platform that a program is traced for, such as "cpu", "gpu" or "tpu".

    It is that of the mesh in context, which may be a topology that this host does not have (compilation ahead of
    time), and else of JAX's default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one_cpu() -> bool:
    """Whether a program is traced for a single CPU device: the place for forms that XLA's CPU compiler does better."""
    return device_platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def _mesh_in_context(axes: tuple[str, ...]) -> AbstractMesh | None:
    """The mesh in context if its axes include these and are the compiler's to use (not so inside a shard_map)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(axes) <= set(mesh.axis_names):
        return None
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def _dividing(mesh: AbstractMesh | None, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The axes if `size` divides over them, else None."""
    if mesh is None or size % math.prod(mesh.shape[axis] for axis in axes):
        return None
    return axes
