"""Whether a training step fits into the memory of GPUs: by their compiler where they are at hand, else by an estimate.

Arguments of the step follow from their shapes and are exact. What it computes on the way is estimated from the traced
program (`cost.temporaries`), which takes as long as tracing: a minute at most, for any network.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.plurals import spell_count
from cost.chips import GIB, GPU_COUNTS, Gpu
from cost.compiled import compile_step, shard_bytes
from cost.step_shapes import sides, split_of
from cost.temporaries import FACTOR, program_temporary_bytes
from train.distributed.mesh import make_mesh
from train.program import Program, create_program
from train.trainable import count_parameters, trained_params, trained_patterns

_PREALLOCATED = 0.75  # of a GPU's memory: what JAX takes unless it is told otherwise


@dataclasses.dataclass(frozen=True)
class GpuFit:
    """A training step on GPUs.

    Attributes:
      gpu: the kind, and how many of it.
      mesh: sizes of the axes, and microbatches.
      batch_size: examples in a step.
      parameters: kind -> number, over all devices: trained, held, frozen.
      arguments: part -> bytes of a device.
      temporary_bytes: of a device, that the step needs beside its arguments.
      compiled_seconds: that the GPU's compiler took; None if `temporary_bytes` is an estimate.
    """

    gpu: Gpu
    mesh: dict[str, int]
    batch_size: int
    parameters: dict[str, int]
    arguments: dict[str, int]
    temporary_bytes: int
    compiled_seconds: float | None

    @property
    def argument_bytes(self) -> int:
        """Of a device, together."""
        return sum(self.arguments.values())

    @property
    def memory_bytes(self) -> int:
        """Of a device, together."""
        return self.argument_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether that is what one has; as far as the figure goes, see `is_close`."""
        return self.memory_bytes <= self.gpu.usable_bytes

    @property
    def is_close(self) -> bool:
        """Whether an estimate that is off by its factor could turn the answer round."""
        if self.compiled_seconds is not None:
            return False
        factor = FACTOR if self.fits else 1 / FACTOR
        return (self.argument_bytes + factor * self.temporary_bytes <= self.gpu.usable_bytes) != self.fits


def on_gpus(config: ConfigDict, count: int) -> ConfigDict:
    """A copy whose mesh splits batch and parameters, as far as its rules go, over so many GPUs."""
    config = config.copy_and_resolve_references()
    config.update({"mesh": {"data": 1, "fsdp": count, "tensor": 1}})
    return config


def smallest_fit(config: ConfigDict, gpu: Gpu) -> tuple[GpuFit, list[str]]:
    """The fewest GPUs of a kind that a step fits, of `cost.chips.GPU_COUNTS`.

    Args:
      config: an experiment; its mesh is of no account.
      gpu: the kind.

    Returns:
      the fit of so few, or of the most that could be tried; and a line for each smaller number.

    Raises:
      UserError: if the config cannot be built for any number.
    """
    tried, best, reason = [], None, None
    for count in GPU_COUNTS:
        try:
            fitted = fit_gpus(on_gpus(config, count), dataclasses.replace(gpu, count=count))
        except UserError as error:
            if count == 1:
                raise
            tried.append(f"{count} x: {error}")
            reason = error
            continue
        if best is not None:
            tried.append(f"{best.gpu.count} x: {best.memory_bytes / GIB:.2f} GiB of each, which does not fit")
        best = fitted
        if fitted.fits:
            break
    if best is None:
        raise reason or UserError("no number of GPUs could be tried")
    return best, tried


def fit_gpus(config: ConfigDict, gpu: Gpu) -> GpuFit:
    """Compiles the training step for the GPUs at hand, or estimates what it needs.

    Args:
      config: an experiment; a frozen stage whose run is missing is described from the config itself.
      gpu: the kind, and how many: this process needs as many devices, virtual ones of the CPU if not GPUs.

    Raises:
      UserError: if the mesh, a rule of it or the batch does not fit so many devices.
    """
    at_hand = jax.default_backend() == "gpu" and jax.device_count() >= gpu.count
    devices = jax.devices() if at_hand else jax.devices("cpu")
    program = create_program(config, make_mesh(config.mesh, devices[: gpu.count]))
    state, seconds = program.abstract_state, None
    arguments = {
        "parameters": shard_bytes((state.params, state.variables)),
        "optimizer": shard_bytes(state.opt_state),
        "averages": shard_bytes((state.ema_params, state.averages)),
        "frozen": shard_bytes(program.abstract_frozen),
        "batch": shard_bytes(program.abstract_batch),
    }
    trained = trained_params(state.params, trained_patterns(config))
    if at_hand:
        compilation = compile_step(program)
        seconds = compilation.seconds
        temporary = max(compilation.total_bytes or 0, compilation.memory_bytes) - sum(arguments.values())
    else:
        temporary = _estimate(program, trained)
    count = count_parameters(trained)
    return GpuFit(
        gpu=gpu,
        mesh={**program.mesh.shape, "microbatches": config.mesh.microbatches},
        batch_size=config.batch_size,
        parameters={
            "trained": count,
            "held": count_parameters(state.params) - count,
            "frozen": count_parameters({part: trees["params"] for part, trees in program.abstract_frozen.items()}),
        },
        arguments=arguments,
        temporary_bytes=max(0, temporary),
        compiled_seconds=seconds,
    )


def _estimate(program: Program, trained: Any) -> int:
    """Temporaries of a device.

    What has the shape of a trained parameter, as its gradient has, is split as that is; all else is taken to have a
    batch, which is split over `data` and `fsdp`.
    """
    kinds = {
        sides(leaf.shape): leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(trained)
    }
    split = functools.partial(split_of, kinds, program.mesh.shape["data"] * program.mesh.shape["fsdp"])
    with program.in_mesh():
        traced = jax.make_jaxpr(program.train_step)(
            program.abstract_state, program.abstract_frozen, program.abstract_batch
        )
    return program_temporary_bytes(traced.jaxpr, split, fused_attention=True)


def describe_gpu_fit(name: str, fitted: GpuFit, tried: list[str]) -> dict[str, Any]:
    """What the command reports, ready for JSON."""
    return {
        "config": name,
        "gpu": fitted.gpu.name,
        "gpus": fitted.gpu.count,
        "mesh": fitted.mesh,
        "batch_size": fitted.batch_size,
        "parameters": fitted.parameters,
        "fits": fitted.fits,
        "close": fitted.is_close,
        "estimated": fitted.compiled_seconds is None,
        "memory_bytes": fitted.memory_bytes,
        "usable_bytes": fitted.gpu.usable_bytes,
        "gpu_bytes": fitted.gpu.memory_bytes,
        "argument_bytes": fitted.arguments,
        "temporary_bytes": fitted.temporary_bytes,
        "compile_seconds": fitted.compiled_seconds,
        "smaller": tried,
    }


def format_gpu_fit(report: Mapping[str, Any]) -> str:
    """Lays a report out for a terminal."""
    needed, usable, arguments = report["memory_bytes"], report["usable_bytes"], report["argument_bytes"]
    verdict = (
        f"fits, {_memory(usable - needed)} left" if report["fits"] else f"does not fit: {_memory(needed - usable)} over"
    )
    if report["estimated"]:
        verdict += ", by an estimate"
    if report["close"]:
        verdict += f" that is too close to be sure of (temporaries may be {FACTOR} times as large or small)"
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if axis != "microbatches")
    source = (
        "ESTIMATE from the traced program; no compiler for a GPU was asked"
        if report["estimated"]
        else f"of the program that the GPU's compiler made in {report['compile_seconds']:.0f} s"
    )
    lines = {
        "config": report["config"],
        "GPU": f"{report['gpus']} x {_memory(report['gpu_bytes'])}, of which a program may use {_memory(usable)}",
        "mesh": f"{mesh}; {spell_count(report['mesh']['microbatches'], 'microbatch', 'microbatches')} of a "
        f"batch of {report['batch_size']}",
        "parameters": ", ".join(f"{count:,} {kind}" for kind, count in report["parameters"].items()),
        "memory of a GPU": f"{_memory(needed)} of {_memory(usable)}: {verdict}",
        "  arguments": f"{_memory(sum(arguments.values()))}, exact: "
        + ", ".join(f"{part} {_memory(size)}" for part, size in arguments.items() if size),
        "  temporaries": f"{_memory(report['temporary_bytes'])}, {source}",
    }
    if report["fits"] and needed > _PREALLOCATED * report["gpu_bytes"]:
        lines["  note"] = "more than JAX takes by itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"
    if report["smaller"]:
        lines["fewer, or other"] = "; ".join(report["smaller"])
    return "\n".join(f"{name:<24}{text}" for name, text in lines.items())


def _memory(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
