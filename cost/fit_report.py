"""What `scripts.fit` says of a step on a slice: a report for JSON, for a terminal, and as a row of docs/tpu.md.

JAX is not imported here: the command sets its environment first.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli.config import flatten
from cli.plurals import spell_count
from configs.common import get_defaults
from cost.chips import GIB
from cost.page_table import PageTable

COLUMNS = (
    "config",
    "topology",
    "data x fsdp x tensor",
    "microbatches",
    "parameters",
    "memory / HBM, GiB",
    "fits",
    "PFLOPs a step",
    "sent, GB",
    "bound",
    "MFU at bound",
    "compiled in",
    "jax, libtpu",
    "hashes",
)


def fit_table(page: Path) -> PageTable:
    """The table of slices on a page: one row for a config, with its overrides, on a slice."""
    return PageTable(page, COLUMNS, ("config", "topology"))


def describe(name: str, fitted: Any, hashes: str) -> dict[str, Any]:
    """Returns what the command reports, ready for JSON.

    Args:
      name: the config and its overrides, as they were typed.
      fitted: a `cost.compiled.Fit`.
      hashes: of `row_hashes`.
    """
    compilation, bound = fitted.compilation, fitted.bound
    return {
        "config": name,
        "topology": fitted.topology,
        "chips": fitted.devices // fitted.chip.devices,
        "devices": fitted.devices,
        "mesh": fitted.mesh,
        "batch_size": fitted.batch_size,
        "parameters": {
            "trained": fitted.trained_parameters,
            "held": fitted.held_parameters,
            "frozen": fitted.frozen_parameters,
        },
        "fits": compilation.fits,
        "memory_bytes": compilation.memory_bytes,
        "hbm_bytes": compilation.available_bytes or fitted.chip.hbm_bytes,
        "argument_bytes": compilation.argument_bytes,
        "argument_bytes_without_padding": fitted.shape_bytes,
        "matrix_flops_per_step": fitted.step_flops,
        "matrix_flops_with_recomputation": fitted.compute_flops,
        "collectives": compilation.collectives
        and {
            each.kind: {"count": each.count, "sent_bytes": each.sent_bytes} for each in compilation.collectives.traffic
        },
        "loops_of_unknown_length": compilation.collectives and compilation.collectives.unknown_loops,
        "bound": bound
        and {
            "seconds": bound.seconds,
            "by": bound.name,
            "compute_seconds": bound.compute,
            "memory_seconds": bound.memory,
            "interconnect_seconds": bound.interconnect,
            "mfu": fitted.utilization,
        },
        "compile_seconds": compilation.seconds,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "hashes": hashes,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Lays a report out for a terminal."""
    needed, hbm = report["memory_bytes"], report["hbm_bytes"]
    verdict = (
        f"fits, {_memory(hbm - needed)} left" if report["fits"] else f"does not fit: {_memory(needed - hbm)} too much"
    )
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if axis != "microbatches")
    unpadded, padded = report["argument_bytes_without_padding"], report["argument_bytes"]
    laid_out = f", {_memory(padded)} as laid out" if padded else ""
    flops, computed = report["matrix_flops_per_step"], report["matrix_flops_with_recomputation"]
    lines = {
        "config": report["config"],
        "topology": f"{report['topology']}: {spell_count(report['chips'], 'chip')}, "
        f"{spell_count(report['devices'], 'device')}",
        "mesh": f"{mesh}; {spell_count(report['mesh']['microbatches'], 'microbatch', 'microbatches')} of a "
        f"batch of {report['batch_size']}",
        "parameters": ", ".join(f"{count:,} {kind}" for kind, count in report["parameters"].items()),
        "memory of a device": f"{_memory(needed)} of {_memory(hbm)}: {verdict}",
        "  of it arguments": f"{_memory(unpadded)} by their shapes{laid_out}",
        "matrix FLOPs of a step": f"{flops:.4g}; {computed:.4g} with what is computed again to save memory",
    }
    for kind, each in (report["collectives"] or {}).items():
        lines[f"  {kind}"] = f"{each['count']} a step, {each['sent_bytes'] / 1e9:.4g} GB sent by a device"
    if report["loops_of_unknown_length"]:
        lines["  incomplete"] = f"{report['loops_of_unknown_length']} loops of unknown length are counted once"
    if bound := report["bound"]:
        parts = ", ".join(f"{part} {bound[f'{part}_seconds']:.4g}" for part in ("compute", "memory", "interconnect"))
        lines["step time at least"] = f"{bound['seconds']:.4g} s, by {bound['by']} ({parts})"
        lines["MFU at most"] = f"{bound['mfu']:.1%} (compiled, not run)"
    lines["compiled in"] = f"{report['compile_seconds']:.0f} s, {_versions(report)}"
    return "\n".join(f"{name:<24}{text}" for name, text in lines.items())


# Keys that recipes give since there are rows of them -> values with which the step is what it was without.
_ADDED = {
    r"process\.variance\.": ("small",),
    r"process\.(weighting|times)\.": ("uniform",),
    r"process\.gamma\.": (5.0,),
    r"process\.time_shift\.": (0,),
    r"process\.schedule\.zero_terminal_snr\.": (False,),
    r"process\.sigma_data\.": (0.5, 1.0),  # of prediction edm, which has no row
    r".*\.latent_shift\.": (0.0,),
    r".*\.latent_scale\.": (None,),
    r"loss\.measured_examples\.": (10_000,),  # at a save
}


def row_hashes(config: Any) -> str:
    """Two short hashes: of what the compiled step depends on in the config, and of that with the compiler's versions.

    Where data lies, how often a run is saved, evaluated or logged, and which run a frozen stage comes from make no
    difference to the step. Nor do keys at their default, so that a key that a later version adds leaves rows valid; one
    that recipes alone have is in `_ADDED`. And on a TPU an attention that is chosen is the plain one.
    """
    apart = ("group.", "seed.", "log.", "checkpoint.", "evaluate.", "wandb.", "sample.", "initialize.")
    defaults = flatten(get_defaults())
    flat = {f"{key}.": value for key, value in flatten(config).items() if defaults.get(key) != value}
    kept = {
        key: value
        for key, value in sorted(flat.items())
        if not key.startswith(apart)
        and not (key.startswith("data.") and key not in ("data.image_size.", "data.text_length."))
        and not (key.startswith("frozen.") and key.endswith((".source.", ".step.")))
        and not (key.endswith(".implementation.") and value in ("auto", "xla"))
        and not any(re.fullmatch(added, key) and value in idle for added, idle in _ADDED.items())
    }
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu") if importlib.util.find_spec(name)]
    return f"{_short_hash(kept)} {_short_hash([kept, versions])}"


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def table_row(report: Mapping[str, Any]) -> dict[str, str]:
    """A report as a row of the table: column -> text."""
    bound, traffic = report["bound"], report["collectives"]
    mesh = report["mesh"]
    sent = sum(each["sent_bytes"] for each in traffic.values()) if traffic is not None else None
    texts = (
        report["config"],
        report["topology"],
        f"{mesh['data']} x {mesh['fsdp']} x {mesh['tensor']}",
        str(mesh["microbatches"]),
        _count(report["parameters"]["trained"] + report["parameters"]["held"]),
        f"{report['memory_bytes'] / GIB:.2f} / {report['hbm_bytes'] / GIB:.2f}",
        "yes" if report["fits"] else "no",
        f"{report['matrix_flops_per_step'] / 1e15:.4g}",
        "-" if sent is None else f"{sent / 1e9:.3g}",
        f"{bound['seconds']:.3g} s, {bound['by']}" if bound else "-",
        f"{bound['mfu']:.0%}" if bound else "-",
        f"{report['compile_seconds']:.0f} s",
        ", ".join(report["versions"].values()),
        report["hashes"],
    )
    return dict(zip(COLUMNS, texts, strict=True))


def _count(number: int) -> str:
    """`12.29 B`, `97.6 M`, `512 K`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def _memory(size: int) -> str:
    """`15.75 GiB`, `3.1 MiB`."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _versions(report: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items())
