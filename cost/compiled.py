"""A training step as a compiler for some devices sees it: memory, products, collectives, and what these allow.

The devices need not be there: the step is compiled from shapes alone, and nothing is allocated or run.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from cli.errors import UserError
from cost.chips import Bound, Chip, chip_of, known_topologies, roofline
from cost.flops import matrix_flops, plain_config
from cost.hlo import Collectives, read_collectives
from cost.measured import program_bytes
from train.distributed.mesh import make_mesh
from train.program import Program, create_program
from train.trainable import count_parameters, trained_params, trained_patterns


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What the compiler made of a step, or why it could not.

    Attributes:
      fits: whether the step fits into the memory of its devices.
      memory_bytes: of a device, that the step needs at its peak: arguments, results and what lies between.
      argument_bytes: of a device, as the arguments are laid out, padding included; None if the step does not fit.
      output_bytes: of a device, likewise; most of it takes the place of an argument.
      available_bytes: of a device, as the compiler said; None if it fits, when it does not say.
      collectives: that a step runs; None if it does not fit.
      seconds: that compiling took.
      total_bytes: of a device, arguments, results and temporaries, as if all of them were held at once, which some
        backends do not count as the peak (`cost.measured.program_bytes`); None if the step does not fit.
    """

    fits: bool
    memory_bytes: int
    argument_bytes: int | None
    output_bytes: int | None
    available_bytes: int | None
    collectives: Collectives | None
    seconds: float
    total_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Fit:
    """A training step on a slice of TPUs.

    Attributes:
      topology: of the slice.
      chip: what it consists of.
      devices: in the slice.
      mesh: sizes of the axes, and microbatches.
      batch_size: examples in a step.
      trained_parameters, held_parameters, frozen_parameters: over all devices; held are those of trained networks
        that `config.trainable` leaves out.
      shape_bytes: of a device: arguments of the step by their shapes, without padding.
      step_flops: matrix FLOPs of a step over all devices, each product once.
      compute_flops: those and what is computed a second time to save memory.
      compilation: the compiler's part.
      bound: None if the step does not fit.
    """

    topology: str
    chip: Chip
    devices: int
    mesh: dict[str, int]
    batch_size: int
    trained_parameters: int
    held_parameters: int
    frozen_parameters: int
    shape_bytes: int
    step_flops: int
    compute_flops: int
    compilation: Compilation
    bound: Bound | None

    @property
    def utilization(self) -> float | None:
        """Share of the peak at the bound; None if the step does not fit."""
        return self.bound and self.bound.utilization(self.chip, self.step_flops / self.devices)


def topology_devices(topology: str) -> list[jax.Device]:
    """Devices of a slice of TPUs that need not be there; the TPU compiler (libtpu) must be.

    Raises:
      UserError: if there is no such slice; lists what there is.
    """
    from jax.experimental import topologies  # loads libtpu

    chip_of(topology)
    # A host has 4 chips, unless it is said otherwise.
    options = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(f"unknown topology {topology!r}; choose one of {known_topologies()}") from error


def fit(config: ConfigDict, topology: str) -> Fit:
    """Compiles the training step of a config for a slice.

    Args:
      config: an experiment; a frozen stage whose run is missing is described from the config itself.
      topology: such as `v5e:4x4`.

    Raises:
      UserError: if there is no such slice, or the mesh, a rule of it or the batch does not fit its devices.
    """
    devices, chip = topology_devices(topology), chip_of(topology)
    mesh = make_mesh(config.mesh, devices)
    program = create_program(config, mesh)
    compilation = compile_step(program)
    compute_flops, bound = step_flops(plain_config(config), mesh), None
    if compilation.collectives is not None:
        bound = roofline(
            chip,
            flops=compute_flops / len(devices),
            hbm_bytes=compilation.argument_bytes + compilation.output_bytes,
            sent_bytes=compilation.collectives.sent_bytes,
        )
    trained = count_parameters(trained_params(program.abstract_state.params, trained_patterns(config)))
    return Fit(
        topology=topology,
        chip=chip,
        devices=len(devices),
        mesh={**mesh.shape, "microbatches": config.mesh.microbatches},
        batch_size=config.batch_size,
        trained_parameters=trained,
        held_parameters=count_parameters(program.abstract_state.params) - trained,
        frozen_parameters=count_parameters({part: trees["params"] for part, trees in program.abstract_frozen.items()}),
        shape_bytes=shard_bytes((program.abstract_state, program.abstract_frozen, program.abstract_batch)),
        step_flops=step_flops(plain_config(config, recompute=False), mesh),
        compute_flops=compute_flops,
        compilation=compilation,
        bound=bound,
    )


def step_flops(config: ConfigDict, mesh: jax.sharding.Mesh) -> int:
    """Matrix FLOPs of a training step over all devices."""
    program = create_program(config, mesh)
    with program.in_mesh():
        return matrix_flops(program.train_step, program.abstract_state, program.abstract_frozen, program.abstract_batch)


def compile_step(program: Program) -> Compilation:
    """Compiles the training step; that memory runs out is an answer here, not an error."""
    with program.in_mesh():
        lowered = program.train_step.lower(program.abstract_state, program.abstract_frozen, program.abstract_batch)
        return compile_lowered(lowered, program.mesh.size)


def compile_lowered(lowered: Any, devices: int) -> Compilation:
    """Compiles a `jax.stages.Lowered` for so many devices; that memory runs out is an answer here, not an error."""
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, available = read_out_of_memory(str(error)) or (None, None)
        if needed is None:
            raise
        return Compilation(False, needed, None, None, available, None, time.monotonic() - start)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    return Compilation(
        fits=True,
        memory_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        available_bytes=None,
        collectives=read_collectives(compiled.as_text(), devices),
        seconds=seconds,
        total_bytes=program_bytes(memory),
    )


def read_out_of_memory(message: str) -> tuple[int, int] | None:
    """Reads (bytes needed, bytes available) of a device from the compiler's message, or None if it says another thing.

    The compiler has two ways to put it: "... memory required for HLO temporaries (96.36G) exceeds available HBM
    (15.75G)", which counts arguments too, and "Used 20.00G of 15.75G hbm".
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    amount = r"([\d.]+)([KMGT]?)"
    for pattern in (rf"\({amount}\) exceeds available HBM \({amount}\)", rf"Used {amount} of {amount} hbm"):
        if found := re.search(pattern, message):
            needed, needed_unit, available, available_unit = found.groups()
            return _bytes(needed, needed_unit), _bytes(available, available_unit)
    return None


def _bytes(amount: str, unit: str) -> int:
    return round(float(amount) * 1024 ** " KMGT".index(unit or " "))


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree's leaves on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
