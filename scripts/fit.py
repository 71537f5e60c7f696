"""`python -m scripts.fit --config=FILE`: whether a training step fits on a slice of TPUs, without having one."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli import entry_point
from cli.accelerators import has_accelerator
from cli.config import flatten, load_config
from cli.errors import EXIT_OK, UserError
from cli.text_files import read_text
from configs.common import get_defaults
from cost.chips import CHIPS, GIB, GPU_COUNTS, Gpu, chip_of, gpu_of

EXIT_DOES_NOT_FIT = 1

_DESCRIPTION = """\
Compiles the real training step of a config with the TPU compiler, on this machine's CPU, for a slice of TPUs that need
not be there. Shows memory, matrix FLOPs, what the collectives send, and the least time that a step can take. Nothing
is allocated or run: no dataset and no other run is needed. A large step takes minutes to compile.

  --config=FILE[:ARGUMENT]   the config; --config.KEY=VALUE overrides a key, such as --config.mesh.fsdp=8

With --gpu it is GPUs by their memory. Their own compiler is asked where JAX finds so many of them; elsewhere arguments
(parameters, optimizer, averages, frozen networks) are exact by their shapes, and temporaries are an estimate from the
traced program, which needs no compiler: a minute for a large network. It is named as one; docs/tpu.md explains it.

With --search=v5e it tries slices of that chip, smallest first, with microbatches, splits over fsdp and recomputation
(models.*.remat), and says the cheapest that fits and the fastest bound, as commands. What arithmetic rules out is not
compiled. Answers are kept in --answers, so that a search that was cut goes on where it was.

With --decode it is the program of `python -m sample` that answers questions, of a Llama or a vision adapter.

The exit code is 0 if the step fits into the memory of its devices and 1 if it does not.
"""

# What XLA's TPU plugin asks of a TPU machine; it is told once and for all, and does not look for one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a TPU here, so nobody else's is taken
}

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


def main(arguments: Sequence[str]) -> int:
    """Parses the command line, compiles or finds the row of the table, and prints."""
    parser = entry_point.parser("scripts.fit", _DESCRIPTION)
    parser.add_argument("--topology", default="", help="a slice such as v5e:4x4 (default: config.mesh.topology)")
    parser.add_argument(
        "--gpu",
        default="",
        metavar="GIB|NAME[:COUNT]",
        help="GPUs instead: 24, 80, 141 or a100, h100:8, ... (default COUNT: the fewest of 1, 2, 4, 8 that hold it)",
    )
    parser.add_argument(
        "--search",
        default="",
        metavar="CHIP[:MOST]",
        help="try slices of a chip, such as v5e, or v5e:16 for no more than 16 chips",
    )
    parser.add_argument(
        "--answers", type=Path, default=Path("runs/fit_search.json"), help="where --search keeps them (%(default)s)"
    )
    parser.add_argument(
        "--decode",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="answers to N questions at once instead of a training step (default N: one a device)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--table", type=Path, help="write a row into this page, unless it is there and still holds")
    options, rest = parser.parse_known_args(arguments)
    config = load_config(rest)
    name = " ".join(rest).replace("--config=", "").replace("--config ", "")
    if options.decode is not None and (options.gpu or options.search or options.table or options.decode < 0):
        raise UserError("--decode=N, of 0 or more questions, goes without --gpu, --search and --table")
    if options.gpu:
        if options.topology or options.table:
            raise UserError("--gpu goes without --topology and --table, which are of TPUs")
        return _fit_gpus(name, config, gpu_of(options.gpu), options.json)
    if options.search:
        if options.topology or options.table or options.json:
            raise UserError("--search goes without --topology, --table and --json")
        return _search(name, config, options.search, options.answers)
    topology = options.topology or config.mesh.topology
    if not topology:
        raise UserError("config.mesh.topology names no slice; give one, such as --topology=v5e:4x4")
    chip_of(topology)
    with config.unlocked():
        config.mesh.topology = topology
    if options.decode is not None:
        return _fit_answers(name, config, options.decode, options.json)
    hashes = row_hashes(config)

    if options.table:
        row = find_row(options.table, name, topology)
        if row and row["hashes"] == hashes:
            print(
                json.dumps({"cached": True, **row}, indent=2) if options.json else f"cached: {' | '.join(row.values())}"
            )
            return EXIT_OK if row["fits"] == "yes" else EXIT_DOES_NOT_FIT

    fit = _prepare_compiler()
    report = describe(name, fit(config, topology), hashes)
    print(json.dumps(report, indent=2) if options.json else format_report(report))
    if options.table:
        write_row(options.table, table_row(report))
    return EXIT_OK if report["fits"] else EXIT_DOES_NOT_FIT


def _prepare_compiler() -> Callable[[Any, str], Any]:
    """Returns `cost.compiled.fit`, which needs an environment that is set before jax is imported."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing: pip install libtpu, or this project's dev extra")
    os.environ.update(ENVIRONMENT)
    import jax

    from cost.compiled import fit

    # An entry would hide how long compiling takes, and a program for absent devices cannot be loaded from one.
    jax.config.update("jax_enable_compilation_cache", False)
    return fit


def _fit_answers(name: str, config: Any, questions: int, as_json: bool) -> int:
    """Answers `--decode`."""
    _prepare_compiler()
    from cost.answering import describe_answers, fit_answers, format_answers

    report = describe_answers(name, fit_answers(config, config.mesh.topology, questions))
    print(json.dumps(report, indent=2) if as_json else format_answers(report))
    return EXIT_OK if report["fits"] else EXIT_DOES_NOT_FIT


def _search(name: str, config: Any, asked: str, answers: Path) -> int:
    """Answers `--search`."""
    kind, _, most = asked.partition(":")
    if kind not in CHIPS or (most and not most.isdigit()):
        raise UserError(f"unknown --search={asked}; choose one of {', '.join(CHIPS)}, and then :MOST chips")
    chip, fit = CHIPS[kind], _prepare_compiler()
    from cost.compiled import topology_devices
    from cost.search import Candidate, Store, candidates, cheapest, fastest, search
    from cost.step_shapes import StepShapes

    slices = candidates(config, chip, int(most or 10**9))
    if not slices:
        raise UserError(f"config.batch_size={config.batch_size} does not divide over any slice of {asked}")

    def say(way: Candidate, outcome: str) -> None:
        recomputed = f", remat {way.remat}" if way.remat else ""
        print(f"{way.topology} fsdp {way.fsdp}, {way.microbatches} microbatch(es){recomputed}: {outcome}", flush=True)

    fitting = search(
        config,
        slices,
        hbm_bytes=chip.hbm_bytes,
        shapes=StepShapes(config, topology_devices(slices[0][0].topology)[0]),
        compile_step=lambda changed, topology: describe(name, fit(changed, topology), row_hashes(changed)),
        key=row_hashes,
        store=Store(answers),
        say=say,
    )
    if not fitting:
        print("nothing fits: a larger slice, another chip, or a smaller batch may")
        return EXIT_DOES_NOT_FIT
    for title, (way, report) in (("cheapest", cheapest(fitting)), ("fastest bound", fastest(fitting))):
        bound = report["bound"]
        print(
            f"\n{title}: {way.chips} chip(s), {way.topology}, at least {bound['seconds']:.4g} s a step by {bound['by']}"
        )
        print(f"    python -m train --config={name} {' '.join(way.overrides())} --workdir=runs/NAME")
    return EXIT_OK


def _fit_gpus(name: str, config: Any, gpu: Gpu, as_json: bool) -> int:
    """Answers `--gpu`."""
    if not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    devices = f"--xla_force_host_platform_device_count={gpu.count or GPU_COUNTS[-1]}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}"  # read when jax is imported
    from cost.gpu_memory import describe_gpu_fit, fit_gpus, format_gpu_fit, smallest_fit

    fitted, tried = (fit_gpus(config, gpu), []) if gpu.count else smallest_fit(config, gpu)
    report = describe_gpu_fit(name, fitted, tried)
    print(json.dumps(report, indent=2) if as_json else format_gpu_fit(report))
    return EXIT_OK if report["fits"] else EXIT_DOES_NOT_FIT


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
        "topology": f"{report['topology']}: {report['chips']} chips, {report['devices']} devices",
        "mesh": f"{mesh}; {report['mesh']['microbatches']} microbatch(es) of a batch of {report['batch_size']}",
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


def read_table(page: Path) -> list[dict[str, str]]:
    """Reads the rows of a page's table.

    Raises:
      UserError: if the page is missing or has no such table.
    """
    lines = _lines(page)
    rows = []
    for line in lines[_header(page, lines) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
    return rows


def find_row(page: Path, config: str, topology: str) -> dict[str, str] | None:
    """The row of a config, with its overrides, on a slice."""
    return next((row for row in read_table(page) if (row["config"], row["topology"]) == (config, topology)), None)


def write_row(page: Path, row: Mapping[str, str]) -> None:
    """Puts a row in the place of the one for the same config and slice, or after the last one.

    Raises:
      UserError: if the page is missing or has no such table.
    """
    lines = _lines(page)
    rows = read_table(page)
    first = _header(page, lines) + 2
    keys = [(each["config"], each["topology"]) for each in rows]
    key = (row["config"], row["topology"])
    place = keys.index(key) if key in keys else len(rows)
    lines[first + place : first + place + (key in keys)] = [_line(row[column] for column in COLUMNS)]
    new = page.with_suffix(".tmp")
    new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    new.replace(page)


def _lines(page: Path) -> list[str]:
    return read_text(page, "page of --table").removesuffix("\n").split("\n")


def _header(page: Path, lines: list[str]) -> int:
    """Number of the line with the column names."""
    if _line(COLUMNS) not in lines:
        raise UserError(f"{page} has no table with the columns {', '.join(COLUMNS)}; docs/tpu.md has")
    return lines.index(_line(COLUMNS))


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


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


if __name__ == "__main__":
    entry_point.run(main)
