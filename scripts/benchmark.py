"""`python -m scripts.benchmark`: what a config costs on the devices at hand, or a table beside other projects."""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cli import entry_point
from cli.allocator import reexec_with_fast_allocator
from cli.config import load_config
from cli.errors import EXIT_FAILURE, UserError
from cli.plurals import spell_count
from cost.suite import run_suite

_DESCRIPTION = """\
Measures a training step (time, examples, tokens and matrix FLOPs a second, share of the device's peak, memory,
compilation), the data pipeline alone, sampling, and one token's decoding by its position. Median, and least to
greatest, of several windows after a warm-up. Steps run on made-up batches with random frozen stages, so only `data`
needs a prepared dataset; none needs a run.

  --config=FILE[:ARGUMENT]   the config; --config.KEY=VALUE overrides a key

Or, with --suite, measures a table of rows beside torch, diffusers, transformers and others (`make parity` installs
them), both sides warmed up, with as many threads, windows in turn; and writes the table in docs/performance.md. Each
row is saved when it is measured: started again, the suite goes on with the rows that this commit, machine and versions
lack. That of a GPU also runs the tests that need one, and trains on the embedded dataset and grades the pictures; it
ends within --minutes.
"""
_PARTS = ("step", "data", "sample", "decode")
_OF_A_CONFIG = ("measure", "windows", "steps", "warmup", "distributed", "against", "json")
_OF_A_SUITE = ("rows", "again", "no_compile", "toy", "results", "minutes", "prepare")
_GPU_MINUTES = 12.0


def main(arguments: Sequence[str]) -> int | None:
    """Parses the command line and measures; returns the exit code of a suite."""
    parser = entry_point.parser("scripts.benchmark", _DESCRIPTION)
    parser.add_argument(
        "--measure", default="step,data", metavar="PARTS", help=f"some of {','.join(_PARTS)} (default step,data)"
    )
    parser.add_argument("--windows", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--steps", type=int, default=10, help="updates in a window (default 10)")
    parser.add_argument("--warmup", type=int, default=5, help="updates before the first window (default 5)")
    parser.add_argument(
        "--distributed", default="", metavar="WHERE", help="where several processes meet, as for `python -m train`"
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="OVERRIDES",
        help="time the step in turn with that of the same config with other keys, such as "
        "--against='--config.data.latent_moments=auto'",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: seconds of this process, which tell something beside other work, on one core",
    )
    suites = parser.add_argument_group("with --suite")
    suites.add_argument("--suite", choices=("cpu", "gpu"), help="which table")
    suites.add_argument("--rows", default="", metavar="PATTERN", help="those whose names have this in them")
    suites.add_argument("--again", action="store_true", help="measure rows that are there, too")
    suites.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    suites.add_argument("--toy", action="store_true", help="toy sizes, a rehearsal; writes where --results says")
    suites.add_argument("--results", metavar="FOLDER", help="of the records (default docs/benchmarks)")
    suites.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="leave out what would not be done by then, the most important first; 0 for no end (default: 12 with "
        "--suite=gpu, else 0)",
    )
    suites.add_argument(
        "--prepare", action="store_true", help="of --suite=gpu: print what its machine needs before, and how to get it"
    )
    options, rest = parser.parse_known_args(arguments)
    unset = argparse.Namespace(**dict.fromkeys(vars(options)))  # what is not None afterwards was given
    given, _ = parser.parse_known_args(arguments, unset)
    for name in _OF_A_CONFIG if options.suite else _OF_A_SUITE:
        if getattr(given, name) is not None:
            raise UserError(f"--{name} does nothing {'with' if options.suite else 'without'} --suite; leave it out")
    if options.suite == "gpu" and options.clock == "processor":
        raise UserError("--clock=processor does not see what a GPU does; leave it out with --suite=gpu")
    if options.suite:
        if rest:
            raise UserError(f"--suite has its own sizes; leave out {' '.join(rest)}")
        if options.minutes is not None and not 0 <= options.minutes < 10_000:
            raise UserError(f"--minutes={options.minutes:g} must be at least 0")
        if options.prepare:
            return _prepare(options.suite)
        signal.signal(signal.SIGTERM, _stop)
        usual = _GPU_MINUTES if options.suite == "gpu" and not options.toy else 0.0
        return run_suite(
            options.suite,
            pattern=options.rows,
            toy=options.toy,
            clock=options.clock,
            compiled=not options.no_compile,
            again=options.again,
            minutes=usual if options.minutes is None else options.minutes,
            results=Path(options.results) if options.results else None,
        )
    config = load_config(rest)
    other = load_config([*rest, *shlex.split(options.against)]) if options.against else None
    parts = tuple(part for part in options.measure.split(",") if part)
    if not parts or not set(parts) <= set(_PARTS):
        raise UserError(f"--measure={options.measure} is not a choice of {','.join(_PARTS)}")
    if other is not None and "step" not in parts:
        raise UserError("--against is of the step, which --measure leaves out")
    if options.clock == "processor" and "data" in parts:
        raise UserError("--clock=processor is not of data, which other processes may read; give --measure=step")
    if min(options.windows, options.steps) < 1 or options.warmup < 0:
        raise UserError("--windows and --steps must be at least 1, --warmup at least 0")

    import jax

    from train.distributed.processes import join_processes

    join_processes(options.distributed)
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured too
    if options.clock == "processor" and jax.default_backend() != "cpu":
        raise UserError(f"--clock=processor does not see what a {jax.default_backend()} does; leave it out")
    effort = {"windows": options.windows, "steps": options.steps, "warmup": options.warmup}
    report = benchmark(config, parts, **effort, other=other, clock=options.clock)
    if jax.process_index() == 0:
        print(json.dumps(report, indent=2) if options.json else format_report(report))
    return None


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends a suite by way of what it has begun, so that no program of it goes on alone."""
    sys.exit(EXIT_FAILURE)


def _prepare(suite: str) -> None:
    """Answers `--prepare`."""
    if suite != "gpu":
        raise UserError("--prepare is of --suite=gpu; `make benchmark` installs what --suite=cpu needs")
    from cost.gpu_machine import describe_preparation

    print(describe_preparation())


def benchmark(
    config: Any,
    parts: Sequence[str],
    *,
    windows: int,
    steps: int,
    warmup: int,
    other: Any = None,
    clock: str = "wall",
) -> dict[str, Any]:
    """Measures parts of a config's work.

    Args:
      config: an experiment.
      parts: of "step", "data", "sample", "decode".
      windows: how many times to measure each.
      steps: updates in a window.
      warmup: updates before the first one.
      other: a config whose step is timed in turn with that of the first; None for none.
      clock: a key of `cost.side_by_side.CLOCKS`, for all but the data.

    Returns:
      environment, objective, batch_size, dtype, clock, and the report of each part; `data` is {"missing": why} if the
      dataset was not prepared.
    """
    from cost.decoding import measure_decoding
    from cost.measured import compare_steps, describe_devices, dtype_of, measure_data, measure_sample, measure_step
    from cost.side_by_side import CLOCKS
    from data.records import dataset_folder

    report: dict[str, Any] = {
        "clock": clock,
        "objective": config.objective,
        "batch_size": config.batch_size,
        "dtype": dtype_of(config),
        "environment": describe_devices(),
    }
    if "step" in parts:
        report["step"] = measure_step(config, windows=windows, steps=steps, warmup=warmup, clock=CLOCKS[clock])
    if other is not None:
        report["against"] = compare_steps(
            config, other, windows=windows, steps=steps, warmup=warmup, clock=CLOCKS[clock]
        )
    if "data" in parts:
        try:
            dataset_folder(config.data.dataset, config.data.data_dir)
        except UserError as error:
            report["data"] = {"missing": str(error)}
        else:
            report["data"] = measure_data(config, windows=windows)
            if "step" in report:
                consumed = report["step"]["examples_per_second"]["median"]
                for name, rate in (
                    ("ratio_to_step", report["data"]["examples_per_second"]["median"]),
                    ("first_pass_ratio_to_step", report["data"]["first_pass_examples_per_second"]),
                ):
                    report["data"][name] = rate / consumed
                step, read = report["step"]["processor_seconds"], report["data"]["first_pass_processor_seconds"]
                if step and read:
                    report["data"]["first_pass_processor_ratio_to_step"] = step / config.batch_size / read
    if "sample" in parts:
        report["sample"] = measure_sample(config, windows=windows, clock=CLOCKS[clock])
    if "decode" in parts:
        report["decode"] = measure_decoding(config, windows=windows, clock=CLOCKS[clock])
    return report


def format_report(report: dict[str, Any]) -> str:
    """Lays a report out for a terminal."""
    machine = report["environment"]
    load = f", load average {machine['load_average']:.1f}" if machine["load_average"] is not None else ""
    packages = machine["packages"]
    lines = [
        f"{report['objective']}, batch size {report['batch_size']}, {report['dtype']}"
        + (", processor seconds" if report["clock"] == "processor" else ""),
        f"{machine['device_count']} x {machine['device_kind']} ({machine['cores']} cores{load}), "
        f"jax {packages['jax']}, flax {packages['flax']}, commit {(machine['commit'] or 'unknown')[:12]}"
        + (" with changes" if machine["dirty"] else ""),
    ]
    if "step" in report:
        lines += _step_lines(report["step"])
    if "against" in report:
        lines += _against_lines(report["against"])
    if "data" in report:
        lines += _data_lines(report["data"])
    if "sample" in report:
        sample = report["sample"]
        lines.append(
            f"sampling        {_spread(sample['images_per_second'])} images/s ({sample['images']} in a call, after "
            f"{sample['compile_seconds']:.1f} s of compilation)"
        )
    if "decode" in report:
        decode = report["decode"]
        lines += [
            f"decoding        {_spread(seconds, 1e3)} ms for image token {position} of {decode['image_tokens']}, "
            f"{spell_count(decode['pictures'], 'picture')}"
            for position, seconds in decode["positions"].items()
        ]
        lines.append(f"                the last position takes {decode['last_over_first']:.2f} times the first one's")
    return "\n".join(lines)


def _step_lines(step: dict[str, Any]) -> list[str]:
    memory = step["memory"]
    planned = {
        "on a device": memory["device_peak_bytes"],
        "planned by the compiler for a device": memory["program_peak_bytes"],
        "resident in the process": memory["resident_peak_bytes"],
    }
    lines = [
        f"compilation     {step['compile_seconds']:.1f} s, after {step['trace_seconds']:.1f} s of tracing",
        f"step            {_spread(step['seconds'], 1e3)} ms ({step['windows']} windows of {step['steps_per_window']})",
        f"examples        {_spread(step['examples_per_second'])} /s",
    ]
    if step["attention"]:
        lines.insert(1, f"attention       {', '.join(step['attention'])}")
    if "tokens_per_second" in step:
        lines.append(f"tokens          {_spread(step['tokens_per_second'])} /s")
    if step["processor_seconds"] is not None:
        lines.append(
            f"processor       {1e3 * step['processor_seconds']:,.4g} ms a step, of all cores; "
            f"{step['page_faults']:,.0f} page faults"
        )
    return [
        *lines,
        f"matrix FLOPs    {_spread(step['flops_per_second'], 1e-9)} GFLOP/s, "
        f"{step['matrix_flops_per_step'] / 1e9:,.4g} GFLOP a step",
        f"MFU             {_spread(step['mfu'], 1e2)} % of {step['peak_flops_per_second'] / 1e9:,.4g} GFLOP/s "
        f"({step['peak_source']})",
        "peak memory     "
        + "; ".join(f"{size / 2**20:,.0f} MiB {what}" for what, size in planned.items() if size is not None),
    ]


def _against_lines(against: dict[str, Any]) -> list[str]:
    first, second = (f"{size / 2**20:,.1f} MiB" if size is not None else "?" for size in against["program_peak_bytes"])
    return [
        f"the other step  {_spread(against['seconds'], 1e3)} ms, {_spread(against['processor_seconds'], 1e3)} ms of "
        "processor time",
        f"                the first takes {_spread(against['ratio'])} times as long, "
        f"{_spread(against['processor_ratio'])} times the processor time",
        f"                planned by the compiler for a device: {first}, and {second} of the other",
    ]


def _data_lines(data: dict[str, Any]) -> list[str]:
    if "missing" in data:
        return [f"data            not measured: {data['missing']}"]
    ratio = f", {data['ratio_to_step']:.1f} times what a step takes" if "ratio_to_step" in data else ""
    times = [f"{data['first_pass_ratio_to_step']:.1f} times"] if "first_pass_ratio_to_step" in data else []
    if "first_pass_processor_ratio_to_step" in data:  # which other programs on the machine do not change
        times.append(f"{data['first_pass_processor_ratio_to_step']:.1f} times by processor time")
    first = f" ({', '.join(times)})" if times else ""
    return [
        f"data            {_spread(data['examples_per_second'])} examples/s{ratio}; first pass "
        f"{data['first_pass_examples_per_second']:,.0f}{first}"
    ]


def _spread(figure: dict[str, float], unit: float = 1.0) -> str:
    """`median (low to high)`, four digits of each, times `unit`."""
    median, low, high = (f"{figure[key] * unit:,.4g}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


if __name__ == "__main__":
    reexec_with_fast_allocator()
    entry_point.run(main)
