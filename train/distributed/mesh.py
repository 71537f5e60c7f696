"""Devices as a mesh, and numpy batches onto it."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.plurals import spell_count

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices along `data`, `fsdp` and `tensor`.

    Args:
      config: `config.mesh` with a size for each axis; one of them may be -1, for all devices that are left.
      devices: defaults to every device.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config[axis] for axis in AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh sizes must be positive, with at most one -1, not {sizes}")
    given = int(np.prod([size for size in sizes if size != -1]))
    if len(devices) % given or (-1 not in sizes and given != len(devices)):
        there = spell_count(len(devices), "device")
        raise UserError(f"config.mesh {dict(zip(AXES, sizes, strict=True))} does not fit {there}")
    shape = tuple(len(devices) // given if size == -1 else size for size in sizes)
    # Explicit axes, the default of jax.make_mesh, would ask every matmul for its output sharding.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over every device that does not share a tensor."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError unless the batch divides into microbatches, those over devices, and these into packed rows."""
    shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.mesh.microbatches
    if parts < 1:
        raise UserError(f"config.mesh.microbatches must be at least 1, not {parts}")
    if config.batch_size % (shards * parts):
        times = f" x {parts} microbatches" if parts > 1 else ""
        there = f"{spell_count(shards, 'device')}{times}"
        raise UserError(f"config.batch_size={config.batch_size} does not divide over {there}")
    has, pack = config.batch_size // (shards * parts), config.loss.get("pack", 1)
    if has % pack:
        what = "a microbatch" if parts > 1 else "a batch"
        raise UserError(f"config.loss.pack={pack} does not divide the examples that a device has of {what}, {has}")


def process_rows(sharding: NamedSharding, batch_size: int, process: int | None = None) -> list[int]:
    """Rows of the global batch that the devices of a process hold, ascending.

    They come from the sharding, not from the process index: the order of devices in a mesh need not follow processes.

    Args:
      sharding: of a batch.
      batch_size: of the global batch; must divide.
      process: index of the process; None for this one.
    """
    process = jax.process_index() if process is None else process
    places = sharding.devices_indices_map((batch_size,))
    slices = [index[0] for device, index in places.items() if device.process_index == process]
    return sorted({row for piece in slices for row in range(batch_size)[piece]})


def place_batch(
    batch: Mapping[str, np.ndarray], rows: Sequence[int], batch_size: int, sharding: NamedSharding
) -> dict[str, jax.Array]:
    """Builds the global batch from the rows that this process read.

    Args:
      batch: arrays whose first dimension follows `rows`.
      rows: what `process_rows` gave.
      batch_size: of the global batch.
      sharding: of the first dimension.
    """
    place = {row: position for position, row in enumerate(rows)}

    def put(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            wanted = [place[row] for row in range(batch_size)[index[0]]]
            return array[wanted[0] : wanted[-1] + 1]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

    return {name: put(array) for name, array in batch.items()}
