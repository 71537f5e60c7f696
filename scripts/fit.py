"""`python -m scripts.fit --config=FILE`: whether a training step fits on a slice of TPUs, without having one."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cli import entry_point
from cli.accelerators import has_accelerator
from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from cost.chips import CHIPS, GPU_COUNTS, Gpu, chip_of, gpu_of
from cost.fit_report import describe, fit_table, format_report, row_hashes, table_row
from cost.scaling import points, refused, scaling_row, scaling_table, turn_rows, turns_table

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
compiled, and what takes the compiler longer than --minutes, or more memory than there is, is not known. Answers are
kept in --answers, so that a search that was cut goes on where it was. With --search=24,80,h100 it tries numbers of GPUs
likewise, 1 to 8 of each, by estimates, and says the fewest.

With --scaling=docs/scaling.md it compiles the step for slices of 1 to 256 chips, each device with as many examples, and
for smaller batches, and writes memory, traffic and bounds as rows of that page, which says what they show. What takes
longer than --minutes has no row.

With --decode it is the program of `python -m sample` that answers questions, of a Llama or a vision adapter.

The exit code is 0 if the step fits into the memory of its devices, of a search into any of those tried, and 1 if not.
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

_MOST_MINUTES = 10_000  # a week

_SEARCHED = f"choose one of {', '.join(CHIPS)}, and then :MOST chips"


def main(arguments: Sequence[str]) -> int:
    """Parses the command line, compiles or finds the row of the table, and prints."""
    options, rest = _parser().parse_known_args(arguments)
    config = load_config(rest)
    name = _name(rest)
    if options.scaling:
        if options.gpu or options.search or options.table or options.json or options.decode is not None:
            raise UserError("--scaling goes without --gpu, --search, --table, --json and --decode")
    elif options.chips or options.examples:
        raise UserError("--chips and --examples are of --scaling")
    if options.decode is not None and (options.gpu or options.search or options.table or options.decode < 0):
        raise UserError("--decode=N, of 0 or more questions, goes without --gpu, --search and --table")
    if not 0 < options.minutes <= _MOST_MINUTES:
        raise UserError(f"--minutes={options.minutes:g} is not above 0 and at most {_MOST_MINUTES}")
    if options.gpu:
        if options.topology or options.table:
            raise UserError("--gpu goes without --topology and --table, which are of TPUs")
        return _fit_gpus(name, config, gpu_of(options.gpu), options.json)
    if options.search:
        if options.topology or options.table or options.json:
            raise UserError("--search goes without --topology, --table and --json")
        if options.search.partition(":")[0] in CHIPS:
            return _search(rest, config, options.search, options.answers, options.minutes)
        return _search_gpus(rest, config, options.search)
    topology = options.topology or config.mesh.topology
    if not topology:
        raise UserError("config.mesh.topology names no slice; give one, such as --topology=v5e:4x4")
    chip_of(topology)
    with config.unlocked():
        config.mesh.topology = topology
    if options.scaling:
        chips, examples = _numbers("chips", options.chips), _numbers("examples", options.examples)
        return _scale(rest, config, options.scaling, chips, examples, options.minutes)
    if options.decode is not None:
        return _fit_answers(name, config, options.decode, options.json)
    hashes = row_hashes(config)

    table = fit_table(options.table) if options.table else None
    if table:
        row = table.find(name, topology)
        if row and row["hashes"] == hashes:
            print(
                json.dumps({"cached": True, **row}, indent=2) if options.json else f"cached: {' | '.join(row.values())}"
            )
            return EXIT_OK if row["fits"] == "yes" else EXIT_DOES_NOT_FIT

    fit = _prepare_compiler()
    report = describe(name, fit(config, topology), hashes)
    print(json.dumps(report, indent=2) if options.json else format_report(report))
    if table:
        table.write(table_row(report))
    return EXIT_OK if report["fits"] else EXIT_DOES_NOT_FIT


def _name(arguments: Sequence[str]) -> str:
    """What rows call a config: what stands behind `--config`, overrides too."""
    return " ".join(arguments).replace("--config=", "").replace("--config ", "")


def _parser() -> argparse.ArgumentParser:
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
        metavar="CHIP[:MOST]|GPU[:MOST],...",
        help="try slices of a chip, such as v5e, or v5e:16 for at most 16 chips; or GPUs, such as 24,80,h200:4",
    )
    parser.add_argument(
        "--answers", type=Path, default=Path("runs/fit_search.json"), help="where --search keeps them (%(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=30.0,
        help="that --search and --scaling give the compiler for each (%(default)g)",
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
    parser.add_argument(
        "--scaling",
        type=Path,
        metavar="PAGE",
        help="write rows for slices of many sizes into this page",
    )
    parser.add_argument(
        "--chips",
        default="",
        metavar="N[,N]",
        help="of the slices of --scaling (default: 1, 4, 16, 64, 256, as far as the kind has them)",
    )
    parser.add_argument(
        "--examples",
        default="",
        metavar="N[,N]",
        help="on each device, of --scaling (default: as on config.mesh.topology, and on the largest slice also less)",
    )
    return parser


def _numbers(flag: str, text: str) -> list[int]:
    """Reads `1,4,16`."""
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", text):
        raise UserError(f"--{flag}={text} is not a list of numbers, such as 1,4,16")
    return [int(number) for number in text.split(",") if number]


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


def _search(arguments: Sequence[str], config: Any, asked: str, answers: Path, minutes: float) -> int:
    """Answers `--search` of the config that the arguments name."""
    kind, _, most = asked.partition(":")
    if most and not most.isdigit():
        raise UserError(f"unknown --search={asked}; {_SEARCHED}")
    chip = CHIPS[kind]
    _prepare_compiler()
    from cost.compiled import topology_devices
    from cost.search import Candidate, Store, candidates, cheapest, fastest, search
    from cost.step_shapes import StepShapes

    slices = candidates(config, chip, int(most or 10**9))
    if not slices:
        raise UserError(f"config.batch_size={config.batch_size} does not divide over any slice of {asked}")

    def say(way: Candidate, outcome: str) -> None:
        print(f"{way.topology} {_say_way(way)}: {outcome}", flush=True)

    fitting = search(
        config,
        slices,
        chip=chip,
        shapes=StepShapes(config, topology_devices(slices[0][0].topology)[0]),
        compile_step=lambda way: _compile_apart(_with(arguments, way.overrides()), minutes),
        key=row_hashes,
        store=Store(answers),
        say=say,
    )
    if not fitting:
        print("nothing is known to fit: a larger slice, another chip, or a smaller batch may")
        return EXIT_DOES_NOT_FIT
    for title, (way, report) in (("cheapest", cheapest(fitting)), ("fastest bound", fastest(fitting))):
        bound = report["bound"]
        print(
            f"\n{title}: {way.chips} chip(s), {way.topology}, at least {bound['seconds']:.4g} s a step by {bound['by']}"
        )
        print(f"    python -m train {shlex.join(_with(arguments, way.overrides()))} --workdir=runs/NAME")
    return EXIT_OK


def _with(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """A config's arguments with overrides in the place of those for the same keys."""
    keys = {override.partition("=")[0] for override in overrides}
    return [*(each for each in arguments if "=" not in each or each.partition("=")[0] not in keys), *overrides]


def _compile_apart(arguments: Sequence[str], minutes: float) -> dict[str, Any]:
    """The report on a config of another process, whose memory and time may run out without an end to this one."""
    from cost.search import NoAnswer

    command = [sys.executable, "-m", "scripts.fit", *arguments, "--json"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"the compiler was stopped after {minutes:g} minutes; --minutes gives it more") from error
    if result.returncode == -signal.SIGKILL:
        raise NoAnswer("the compiler was killed, as happens where memory runs out")
    try:
        report: dict[str, Any] = json.loads(result.stdout)
    except ValueError as error:
        said = [line for line in result.stderr.splitlines() if line.strip()]
        raise UserError(said[-1] if said else f"the compiler ended with {result.returncode}") from error
    return report


def _say_way(way: Any) -> str:
    recomputed = f", remat {way.remat}" if way.remat else ""
    return f"fsdp {way.fsdp}, {way.microbatches} microbatch(es){recomputed}"


def _search_gpus(arguments: Sequence[str], config: Any, asked: str) -> int:
    """Answers `--search` of GPUs, each with the most that are tried of it; 0 if any of them holds the step."""
    try:
        gpus = [gpu_of(each) for each in asked.split(",")]
    except UserError as error:
        raise UserError(f"unknown --search={asked}; {_SEARCHED}, or GPUs: {error}") from error
    os.environ["JAX_PLATFORMS"] = "cpu"  # for shapes alone, whatever else the user runs on
    import jax

    from cost.gpu_search import gpu_candidates, search_gpus
    from cost.search import Candidate
    from cost.step_shapes import StepShapes

    def say(way: Candidate, outcome: str) -> None:
        print(f"{way.chips} GPU(s), {_say_way(way)}: {outcome}", flush=True)

    shapes, found = StepShapes(config, jax.devices("cpu")[0], fused_attention=True), False
    for gpu in gpus:
        machines = gpu_candidates(config, gpu.count or GPU_COUNTS[-1])
        if not machines:
            raise UserError(f"config.batch_size={config.batch_size} does not divide over any number of GPUs")
        fewest = search_gpus(config, machines, gpu=gpu, shapes=shapes, say=say)
        if fewest is None:
            print(f"\nnothing of {gpu.name} fits, by an estimate: more GPUs, larger ones, or a smaller batch may\n")
            continue
        found, (way, sure) = True, fewest
        print(f"\ncheapest of {gpu.name}: {way.chips} GPU(s), by an estimate{'' if sure else ' that is close'}")
        print(f"    python -m train {shlex.join(_with(arguments, way.overrides()))} --workdir=runs/NAME\n", flush=True)
    return EXIT_OK if found else EXIT_DOES_NOT_FIT


def _scale(
    arguments: Sequence[str],
    config: Any,
    page: Path,
    chips: Sequence[int],
    examples: Sequence[int],
    minutes: float,
) -> int:
    """Answers `--scaling`."""
    table, turns = scaling_table(page), turns_table(page)
    for each in (table, turns):
        each.read()  # a page without them is an error before anything is compiled
    name, chip = _name(arguments), chip_of(config.mesh.topology)
    _prepare_compiler()
    from cost.compiled import topology_devices
    from cost.search import NoAnswer
    from cost.step_shapes import StepShapes

    devices = topology_devices(config.mesh.topology)
    for point in points(config, chip, len(devices), chips, examples):
        changed = point.apply(config)
        hashes, row = row_hashes(changed), table.find(name, *point.key)
        if row is None or row["hashes"] != hashes:
            needed = StepShapes(changed, devices[0]).argument_bytes(changed, point.devices)
            if needed > chip.hbm_bytes:
                report = refused(changed, point.devices, needed, chip)
            else:
                try:
                    report = _compile_apart(_with(arguments, point.overrides(config)), minutes)
                except NoAnswer as error:
                    print(f"{name} | {point.topology} | {point.examples} | not known: {error}", flush=True)
                    continue
            row = scaling_row(name, point, report, chip, hashes)
            table.write(row)
        print(" | ".join(row.values()), flush=True)
        for turn in turn_rows(each for each in table.read() if each["config"] == name):
            turns.write(turn)
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


if __name__ == "__main__":
    entry_point.run(main)
