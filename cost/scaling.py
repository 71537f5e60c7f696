"""How a step's memory, traffic and bound grow with devices and with the batch, and where communication takes over.

A row is one compiled step: so many chips, so many examples on each device. Rows are kept on a page, so that a table
that was cut short goes on, and what arithmetic rules out is a row too.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cli.errors import UserError
from cost.chips import GIB, Chip
from cost.page_table import PageTable, Row

_CHIPS = (1, 4, 16, 64, 256)  # of slices, unless others are asked for
_SHARES = (4, 16)  # of a device's examples, on the largest slice

COLUMNS = (
    *("config", "topology", "examples a device", "data x fsdp x tensor", "memory / HBM, GiB", "fits"),
    *("TFLOPs a device", "sent, GB", "compute, ms", "memory, ms", "interconnect, ms", "bound", "compiled in"),
    *("jax, libtpu", "hashes"),
)
TURNS = ("config", "topology", "interconnect", "compute", "turns at")
_BLANK = "-"


@dataclasses.dataclass(frozen=True)
class Point:
    """One row to be.

    Attributes:
      topology: the slice.
      devices: of the slice.
      examples: of a batch, on each device that does not share a tensor.
    """

    topology: str
    devices: int
    examples: int

    def apply(self, config: ConfigDict) -> ConfigDict:
        """A copy of the experiment on that slice with that batch.

        Parameters stay split over as many devices as the config says, as far as there are so many.
        """
        config = config.copy_and_resolve_references()
        config.update({"mesh": self._mesh(config), "batch_size": self._batch_size(config)})
        return config

    def overrides(self, config: ConfigDict) -> tuple[str, ...]:
        """The same as what is added to a command line."""
        mesh = (f"--config.mesh.{key}={value}" for key, value in self._mesh(config).items())
        return (*mesh, f"--config.batch_size={self._batch_size(config)}")

    def _mesh(self, config: ConfigDict) -> dict[str, Any]:
        shards = self.devices // config.mesh.tensor
        fsdp = shards if config.mesh.fsdp == -1 else math.gcd(config.mesh.fsdp, shards)
        return {"topology": self.topology, "data": -1, "fsdp": fsdp}

    def _batch_size(self, config: ConfigDict) -> int:
        return self.examples * (self.devices // config.mesh.tensor)

    @property
    def key(self) -> tuple[str, str]:
        """Its part of a row's key."""
        return self.topology, str(self.examples)


def scaling_table(page: Path) -> PageTable:
    """The table of steps on a page."""
    return PageTable(page, COLUMNS, ("config", "topology", "examples a device"))


def turns_table(page: Path) -> PageTable:
    """The table of where communication takes over on a page."""
    return PageTable(page, TURNS, ("config", "topology"))


def points(config: ConfigDict, chip: Chip, devices: int, chips: Sequence[int], examples: Sequence[int]) -> list[Point]:
    """Rows of one config: all numbers of examples on all slices.

    Without `chips` it is slices of 1, 4, 16, 64 and 256, as far as there are such of the kind. Without `examples` it
    is as many as the config's own slice gives a device, on every slice, and on the largest one also a quarter and a
    sixteenth of it, as far as they divide.

    Args:
      config: an experiment.
      chip: the kind.
      devices: of the config's own slice.
      chips: of each slice, or none.
      examples: on a device, or none.

    Raises:
      UserError: if there is no slice of so many chips, or the batch does not divide over the config's own slice.
    """
    slices = {math.prod(map(int, shape.split("x"))): shape for shape in chip.topologies}
    chips = chips or [count for count in _CHIPS if count in slices]
    if missing := [str(count) for count in chips if count not in slices]:
        raise UserError(f"no slice of {chip.name} has {missing[0]} chips; choose of {', '.join(map(str, slices))}")
    shards, tensor = devices // config.mesh.tensor, config.mesh.tensor
    if devices % tensor:
        raise UserError(f"config.mesh.tensor={tensor} does not divide the {devices} devices of the config's own slice")
    if not examples and (config.batch_size % shards or config.batch_size < shards):
        raise UserError(f"config.batch_size={config.batch_size} does not divide over {shards} devices; give --examples")
    own = examples or (config.batch_size // shards,)
    found = []
    for count in chips:
        of_slice = list(own)
        if not examples and count == max(chips):
            of_slice += [own[0] // share for share in _SHARES if own[0] % (share * config.mesh.microbatches) == 0]
        places = count * chip.devices
        if places % tensor == 0:
            found += [Point(f"{chip.name}:{slices[count]}", places, each) for each in of_slice]
    return found


def scaling_row(name: str, point: Point, report: Mapping[str, Any], chip: Chip, hashes: str) -> dict[str, str]:
    """A row of the table: column -> text.

    Args:
      name: the config and its overrides, as they were typed.
      point: what was asked.
      report: of `scripts.fit`, or of arithmetic: {fits, memory_bytes, hbm_bytes, why, mesh}.
      chip: the kind.
      hashes: of the row.
    """
    bound, traffic, mesh = report.get("bound"), report.get("collectives"), report["mesh"]
    parts = [f"{1e3 * bound[f'{part}_seconds']:.3g}" for part in ("compute", "memory", "interconnect")] if bound else ()
    flops = bound and bound["compute_seconds"] * chip.flops / 1e12
    sent = None if traffic is None else sum(each["sent_bytes"] for each in traffic.values())
    compiled = "compile_seconds" in report
    versions = report["versions"].values() if compiled else (importlib.metadata.version(p) for p in ("jax", "libtpu"))
    texts = (
        name,
        *point.key,
        f"{mesh['data']} x {mesh['fsdp']} x {mesh['tensor']}",
        f"{report['memory_bytes'] / GIB:.2f} / {report['hbm_bytes'] / GIB:.2f}",
        "yes" if report["fits"] else f"no{'' if compiled else ', ' + report['why']}",
        f"{flops:.4g}" if bound else _BLANK,
        _BLANK if sent is None else f"{sent / 1e9:.3g}",
        *(parts or [_BLANK] * 3),
        bound["by"] if bound else _BLANK,
        f"{report['compile_seconds']:.0f} s" if compiled else "not compiled",
        ", ".join(versions),
        hashes,
    )
    return dict(zip(COLUMNS, texts, strict=True))


def refused(config: ConfigDict, devices: int, needed: int, chip: Chip) -> dict[str, Any]:
    """The report of a step whose arguments alone do not fit, for `scaling_row`.

    Args:
      config: of a `Point`.
      devices: of its slice.
      needed: bytes of the arguments, of a device.
      chip: the kind.
    """
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    mesh = {"data": devices // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
    why = "arguments alone"
    return {"fits": False, "memory_bytes": needed, "hbm_bytes": chip.hbm_bytes, "why": why, "mesh": mesh}


def turn_rows(rows: Iterable[Row]) -> list[dict[str, str]]:
    """Where communication takes over, for each config and slice of which two rows or more fit.

    Both times are taken to grow along a line through the rows of the fewest and the most examples.
    """
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["bound"] != _BLANK:
            kinds.setdefault((row["config"], row["topology"]), []).append(row)
    found = []
    for (config, topology), of_slice in kinds.items():
        of_slice = sorted(of_slice, key=lambda row: int(row["examples a device"]))
        few, many = of_slice[0], of_slice[-1]
        if few is many or topology.endswith(":1x1"):
            continue
        sent, products = (_line_through(few, many, f"{part}, ms") for part in ("interconnect", "compute"))
        texts = (config, topology, _say_line(sent), _say_line(products), _say_turn(sent, products))
        found.append(dict(zip(TURNS, texts, strict=True)))
    return found


def _line_through(few: Row, many: Row, column: str) -> tuple[float, float]:
    """(constant, rate an example) of a column of milliseconds."""
    start, end = int(few["examples a device"]), int(many["examples a device"])
    low, high = float(few[column]), float(many[column])
    rate = (high - low) / (end - start)
    return low - rate * start, rate


def _say_line(line: tuple[float, float]) -> str:
    return f"{line[0]:.3g} {'-' if line[1] < 0 else '+'} {abs(line[1]):.3g} n ms"


def _say_turn(sent: tuple[float, float], products: tuple[float, float]) -> str:
    """From how many examples a device on products take longer than what is sent."""
    constant, rate = sent[0] - products[0], products[1] - sent[1]
    if rate <= 0:
        return "no batch: traffic grows as fast"
    return f"{constant / rate:.3g} examples" if constant > 0 else "any batch computes"
