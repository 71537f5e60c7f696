"""The slice, mesh, microbatches and recomputation with which a step fits: the fewest chips, and the fastest bound.

Compiling is dear, so arithmetic goes first, small slices go before large ones, and every answer is kept.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ml_collections import ConfigDict

from cli.errors import UserError
from cost.chips import GIB, Chip
from cost.temporaries import FACTOR

Report = dict[str, Any]

_MICROBATCHES = (1, 4, 16)
_REMAT = ("none", "dots", "full")  # by how much is computed again


class NoAnswer(UserError):
    """The compiler was stopped before it knew."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a step.

    Attributes:
      topology: the slice; "" for GPUs.
      chips: of the slice, or GPUs.
      devices: of the slice, or GPUs.
      fsdp: over how many devices parameters are split, if the rules of the mesh split any.
      microbatches: parts of a batch.
      remat: recomputation of all trained networks that know it; "" if none does.
      parts: these networks.
    """

    topology: str
    chips: int
    devices: int
    fsdp: int
    microbatches: int
    remat: str
    parts: tuple[str, ...]

    def overrides(self) -> tuple[str, ...]:
        """What to add to a command line."""
        return (
            *(f"--config.mesh.{key}={value}" for key, value in self._mesh().items()),
            *(f"--config.models.{part}.remat={self.remat}" for part in self.parts),
        )

    def apply(self, config: ConfigDict) -> ConfigDict:
        """A copy of the experiment with the same."""
        config = config.copy_and_resolve_references()
        config.update({"mesh": self._mesh(), "models": {part: {"remat": self.remat} for part in self.parts}})
        return config

    def _mesh(self) -> dict[str, Any]:
        topology = {"topology": self.topology} if self.topology else {}
        return {**topology, "data": -1, "fsdp": self.fsdp, "microbatches": self.microbatches}


@runtime_checkable
class Shapes(Protocol):
    """See `cost.step_shapes.StepShapes`."""

    def argument_bytes(self, config: ConfigDict, devices: int) -> int:
        """Of a device."""
        ...

    def temporary_bytes(self, config: ConfigDict, devices: int) -> int:
        """Of a device, estimated."""
        ...

    def state_bytes(self) -> int:
        """Of all devices together, where each value is held once: what a step begins with but its batch."""
        ...

    def step_flops(self) -> int:
        """Of all devices, without what is computed a second time."""
        ...


class Store:
    """Answers on disk, each written as it comes, so that a search that was cut goes on.

    Args:
      path: of a JSON file, made when the first answer is there.

    Raises:
      UserError: if it holds something else.
    """

    def __init__(self, path: Path):
        self._path, self._answers = path, {}
        if path.exists():
            try:
                self._answers = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError) as error:
                raise UserError(f"{path} is not a search's file of answers: {error}") from error
        if not isinstance(self._answers, dict):
            raise UserError(f"{path} is not a search's file of answers")

    def get(self, key: str) -> Report | None:
        """The answer to a question, if it was asked before."""
        return self._answers.get(key)

    def put(self, key: str, report: Report) -> None:
        """Keeps an answer."""
        self._answers[key] = report
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".tmp")
        new.write_text(json.dumps(self._answers, indent=1), encoding="utf-8")
        new.replace(self._path)


def candidates(config: ConfigDict, chip: Chip, most_chips: int) -> list[list[Candidate]]:
    """`ways` on the slices of a chip.

    Args:
      config: an experiment.
      chip: the kind.
      most_chips: of a slice.
    """
    sizes = [(f"{chip.name}:{topology}", math.prod(map(int, topology.split("x")))) for topology in chip.topologies]
    return ways(config, [(topology, chips, chips * chip.devices) for topology, chips in sizes if chips <= most_chips])


def ways(config: ConfigDict, slices: Iterable[tuple[str, int, int]]) -> list[list[Candidate]]:
    """Ways to run a step, a list a slice: the smallest slice first, and in it what computes the least again.

    Parameters are split over one device, all of the slice, or as many as the config says; not at all where its rules
    split none. `tensor` stays as it is.

    Args:
      config: an experiment.
      slices: topology, chips and devices of each.
    """
    parts = tuple(sorted(part for part, network in config.models.items() if "remat" in network))
    splits = any("fsdp" in axes for _, axes in config.mesh.rules)
    found = []
    for topology, chips, devices in slices:
        tensor = config.mesh.tensor
        if devices % tensor:
            continue
        most = devices // tensor
        fsdp = sorted({size for size in (1, config.mesh.fsdp, most) if most % size == 0}) if splits else [1]
        found.append(
            [
                Candidate(topology, chips, devices, size, microbatches, remat, parts)
                for remat, microbatches, size in itertools.product(
                    _REMAT if parts else ("",), sorted({*_MICROBATCHES, config.mesh.microbatches}), fsdp
                )
                if config.batch_size % (most * microbatches) == 0
            ]
        )
    return sorted((each for each in found if each), key=lambda each: each[0].chips)


def search(
    config: ConfigDict,
    slices: list[list[Candidate]],
    *,
    chip: Chip,
    shapes: Shapes,
    compile_step: Callable[[Candidate], Report],
    key: Callable[[ConfigDict], str],
    store: Store,
    say: Callable[[Candidate, str], None],
) -> list[tuple[Candidate, Report]]:
    """Asks the compiler for what arithmetic leaves open.

    Not compiled: slices on which the state alone exceeds the memory, divided over all devices; what has arguments
    larger than that; what the estimate of `cost.temporaries` makes too large, even if it is off by its factor; and,
    once something fits a slice, what recomputes more or takes more parts there, neither of which lowers the bound,
    or anything if products already are what bounds it.

    Once a slice holds the step, the largest follow, which as a rule are the fastest; those of which products alone take
    longer than the best step so far are left out.

    Args:
      config: an experiment.
      slices: of `candidates`.
      chip: the kind of the slices.
      shapes: arithmetic.
      compile_step: way -> report of `scripts.fit`; raises `NoAnswer` where there is none, which is not kept.
      key: config -> what identifies a question.
      store: answers of this and former searches.
      say: is told each outcome.

    Returns:
      what fits.
    """
    fitting, waiting = [], list(slices)
    while waiting:
        on_slice = waiting.pop(-1 if fitting else 0)
        if fitting:
            least = shapes.step_flops() / (on_slice[0].devices * chip.flops)
            if least >= fastest(fitting)[1]["bound"]["seconds"]:
                say(on_slice[0], f"no way is faster: products alone take {least:.4g} s; nor on smaller slices")
                break
        if why := too_small(shapes, on_slice[0].devices, chip.hbm_bytes):
            say(on_slice[0], why)
            continue
        best: tuple[Candidate, Report] | None = None
        for way in on_slice:
            same = best and (way.remat, way.microbatches) == (best[0].remat, best[0].microbatches)
            if best and (not same or best[1]["bound"]["by"] == "compute"):
                break
            changed = way.apply(config)
            try:
                report = _answer(changed, way, chip.hbm_bytes, shapes, compile_step, key, store)
            except NoAnswer as error:
                say(way, f"not known: {error}")
                continue
            except UserError as error:
                say(way, f"impossible: {error}")
                continue
            say(way, _outcome(report))
            if report["fits"]:
                fitting.append((way, report))
                if best is None or report["bound"]["seconds"] < best[1]["bound"]["seconds"]:
                    best = way, report
    return fitting


def too_small(shapes: Shapes, devices: int, usable_bytes: int) -> str:
    """Why no way to run a step can fit so many devices; "" if the state, divided over all of them, would.

    Args:
      shapes: arithmetic.
      devices: how many.
      usable_bytes: of each.
    """
    least = math.ceil(shapes.state_bytes() / devices)
    if least <= usable_bytes:
        return ""
    memory = f"{least / GIB:.2f} of {usable_bytes / GIB:.2f} GiB"
    return f"no way fits: weights and optimizer alone are {memory} of each device, divided over all"


def cheapest(fitting: list[tuple[Candidate, Report]]) -> tuple[Candidate, Report]:
    """The fewest chips, and of these the fastest bound."""
    return min(fitting, key=lambda each: (each[0].chips, each[1]["bound"]["seconds"]))


def fastest(fitting: list[tuple[Candidate, Report]]) -> tuple[Candidate, Report]:
    """The fastest bound, and of equal ones the fewest chips."""
    return min(fitting, key=lambda each: (each[1]["bound"]["seconds"], each[0].chips))


def _answer(
    config: ConfigDict,
    way: Candidate,
    hbm_bytes: int,
    shapes: Shapes,
    compile_step: Callable[[Candidate], Report],
    key: Callable[[ConfigDict], str],
    store: Store,
) -> Report:
    """The report of a way, or how far arithmetic got: {fits, memory_bytes, hbm_bytes, why}."""
    arguments = shapes.argument_bytes(config, way.devices)
    if arguments > hbm_bytes:
        return {"fits": False, "memory_bytes": arguments, "hbm_bytes": hbm_bytes, "why": "arguments alone"}
    name = key(config)
    if report := store.get(name):
        return {**report, "cached": True}
    temporary = shapes.temporary_bytes(config, way.devices)
    if arguments + temporary / FACTOR > hbm_bytes:
        why = "by an estimate"
        return {"fits": False, "memory_bytes": arguments + temporary, "hbm_bytes": hbm_bytes, "why": why}
    report = compile_step(way)
    store.put(name, report)
    return report


def _outcome(report: Mapping[str, Any]) -> str:
    memory = f"{report['memory_bytes'] / GIB:.2f} of {report['hbm_bytes'] / GIB:.2f} GiB"
    if "why" in report:
        return f"does not fit: {memory}, {report['why']}; not compiled"
    source = "kept from before" if report.get("cached") else f"compiled in {report['compile_seconds']:.0f} s"
    if not report["fits"]:
        return f"does not fit: {memory}; {source}"
    return f"fits: {memory}; step at least {report['bound']['seconds']:.4g} s, by {report['bound']['by']}; {source}"
