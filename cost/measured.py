"""What a config costs on the devices at hand: a training step, its compilation and memory, the data, sampling.

Steps run on made-up batches with made-up frozen stages, so neither a dataset nor another run is needed. Every function
is to be called by all processes alike.
"""

import contextlib
import dataclasses
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cli.errors import UserError
from cost.chips import Peak
from cost.flops import matrix_flops, plain_config
from cost.hlo import read_attention
from cost.peak_flops import matmul_flops, peak_flops
from cost.timing import Spread, time_in_turn, time_windows
from data.batch_reader import BatchReader
from data.pipeline import load_tokenizer, open_stream
from models import create_model
from models.layers.dense import plain_layers
from sample.samplers import create_sampler
from sample.trained import CHUNK
from train.distributed.mesh import batch_sharding, make_mesh, place_batch, process_rows
from train.environment import describe_environment
from train.objectives.contract import Batch
from train.precomputed import locate_precomputed
from train.program import Program, create_program
from weights.run import model_of
from weights.sources import RANDOM, load_frozen

Clock = Callable[[], float]

_FIRST_PASS_SECONDS = 60.0
_STEP_ADVICE = "lower config.batch_size, raise config.mesh.microbatches or config.mesh.fsdp, or recompute (remat)"


def without_sources(config: ConfigDict) -> ConfigDict:
    """Returns the config with random weights in place of every other run's."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for entry in config.frozen.values():
            entry.source = RANDOM
    return config


def made_up_batch(program: Program, config: ConfigDict) -> Batch:
    """A batch of the shapes that the program takes, placed on its devices: random bytes and valid ids.

    Texts end with the end tokens of the networks that read them: CLIP has nothing to say of one without.
    """
    rows, rng = process_rows(program.rows, config.batch_size), np.random.default_rng(config.seed)
    sizes = _vocabularies(config)

    def values(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if name == "index":
            return np.asarray(rows, dtype)
        if np.issubdtype(dtype, np.bool_):
            return np.ones(shape, dtype)
        if np.issubdtype(dtype, np.floating):
            return rng.normal(size=shape).astype(dtype)
        # Of ids without a known vocabulary, 0 is in every one.
        return rng.integers(256 if dtype == np.uint8 else sizes.get(name, 1), size=shape, dtype=dtype)

    batch = {
        name: values(name, (len(rows), *leaf.shape[1:]), np.dtype(leaf.dtype))
        for name, leaf in program.abstract_batch.items()
    }
    if "text" in batch:
        networks = [*config.models.values(), *config.frozen.values()]
        ends = sorted({network["text_end_id"] for network in networks if network.get("text_end_id") is not None})
        batch["text"][:, batch["text"].shape[1] - len(ends) :] = ends
    return place_batch(batch, rows, config.batch_size, program.rows)


def model_flops(config: ConfigDict) -> int:
    """Matrix FLOPs of one update over all devices, without what rematerialization and microbatches repeat."""
    plain = plain_config(without_sources(config), recompute=False)
    with plain_layers():  # the step is traced here already, and the trace kept
        program = create_program(plain, make_mesh(plain.mesh))
    with program.in_mesh():
        return matrix_flops(program.train_step, program.abstract_state, program.abstract_frozen, program.abstract_batch)


def measure_step(
    config: ConfigDict, *, windows: int, steps: int, warmup: int, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Compiles the training step and times it.

    Args:
      config: the experiment.
      windows: how many times to measure.
      steps: updates in a window; the host waits for the devices only at its end.
      warmup: updates before the first window.
      clock: seconds.

    Returns:
      trace_seconds, compile_seconds; `processor_seconds` of a step, over all cores, of this process, and `page_faults`,
      both None on an accelerator; `attention`, the implementations of it that the compiled step has; seconds (of a
      step) and the rates of `step_figures`; `memory`.

    Raises:
      UserError: if the config cannot be built or does not fit the devices.
    """
    config = without_sources(config)
    with _memory_errors(f"batch_size={config.batch_size}", _STEP_ADVICE):
        step = prepare_step(config, clock)
        if warmup:
            step.run(warmup)
        used, faults = time.process_time(), _page_faults()
        seconds = time_windows(step.run, windows=windows, steps=steps, warmup=0, clock=clock)
        used, faults = time.process_time() - used, _page_faults() - faults
    compiled, memory = step.compiled, _memory(step.compiled)  # before other work adds to the peaks
    on_cpu = jax.default_backend() == "cpu"
    devices = jax.process_count() if on_cpu else step.devices  # the virtual devices of a CPU share its cores
    return {
        "windows": windows,
        "steps_per_window": steps,
        "warmup_steps": warmup,
        "trace_seconds": step.trace_seconds,
        "compile_seconds": step.compile_seconds,
        "processor_seconds": used / (windows * steps) if on_cpu else None,
        "page_faults": faults / (windows * steps) if on_cpu else None,
        "attention": list(read_attention(compiled.as_text())),
        **step_figures(
            seconds,
            batch_size=config.batch_size,
            tokens=tokens_of(config),
            flops=model_flops(config),
            devices=devices,
            peak=peak_flops(jax.local_devices()[0], dtype_of(config), functools.partial(matmul_flops, clock=clock)),
        ),
        "memory": memory,
    }


@dataclasses.dataclass(frozen=True)
class PreparedStep:
    """A training step that is ready to run.

    Attributes:
      run: makes so many updates, and returns when the last is done.
      compiled: the program.
      devices: of its mesh.
      trace_seconds: that it took to trace.
      compile_seconds: and to compile.
    """

    run: Callable[[int], None]
    compiled: Any
    devices: int
    trace_seconds: float
    compile_seconds: float


def prepare_step(config: ConfigDict, clock: Clock = time.perf_counter) -> PreparedStep:
    """Compiles the training step of a config without sources, for a made-up batch and state."""
    program = create_program(config, make_mesh(config.mesh))
    with program.in_mesh():
        batch, frozen = made_up_batch(program, config), load_frozen(config, config.seed, program.abstract_frozen)
        start = clock()
        lowered = program.train_step.lower(program.abstract_state, program.abstract_frozen, program.abstract_batch)
        traced = clock()
        compiled = lowered.compile()
        done = clock()
        state = program.init(batch)

    def run(count: int) -> None:
        nonlocal state
        metrics = None
        for _ in range(count):
            state, metrics, _ = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return PreparedStep(run, compiled, program.mesh.size, traced - start, done - traced)


def compare_steps(
    config: ConfigDict, other: ConfigDict, *, windows: int, steps: int, warmup: int, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Times the training steps of two configs in turn, so that what else a machine does slows both down alike.

    Args:
      config: an experiment.
      other: another.
      windows: how many times to measure each.
      steps: updates in a window.
      warmup: updates of each before the first window.
      clock: seconds.

    Returns:
      seconds and processor_seconds (of this process, of all its threads) of the other's step, as {"median", "low",
      "high"}; ratio and processor_ratio, what the first's takes over what the other's takes in the window behind it;
      program_peak_bytes, planned by the compiler, of both.

    Raises:
      UserError: if a config cannot be built, or both do not fit the devices together.
    """
    with _memory_errors("both steps together", _STEP_ADVICE):
        prepared = [prepare_step(without_sources(each), clock) for each in (config, other)]
        runs = {str(place): step.run for place, step in enumerate(prepared)}
        taken = time_in_turn(runs, windows=windows, steps=steps, warmup=warmup, clock=clock)
    report: dict[str, Any] = {}
    for place, name in enumerate(("", "processor_")):
        pairs = [(first[place], second[place]) for first, second in zip(*taken.values(), strict=True)]
        report[f"{name}seconds"] = dataclasses.asdict(Spread.of([second for _, second in pairs]))
        report[f"{name}ratio"] = dataclasses.asdict(Spread.of([first / second for first, second in pairs]))
    report["program_peak_bytes"] = [program_bytes(step.compiled.memory_analysis()) for step in prepared]
    return report


def step_figures(
    seconds: Spread, *, batch_size: int, tokens: int, flops: int, devices: int, peak: Peak
) -> dict[str, Any]:
    """Rates of a step that takes `seconds`.

    Args:
      seconds: of a step.
      batch_size: examples in it, over all devices.
      tokens: of an example; 0 where there are none, which leaves their rate out.
      flops: matrix FLOPs of the step, over all devices.
      devices: how many there are of what `peak` is of.
      peak: of one device.

    Returns:
      seconds, examples_per_second, tokens_per_second, matrix_flops_per_step, flops_per_second, peak_flops_per_second,
      peak_source and mfu, the model FLOPs utilization (Chowdhery et al. 2022, appendix B): achieved over peak. What
      was measured in windows is {"median", "low", "high"}.
    """
    rate = seconds.rate(flops)
    figures = {"seconds": seconds, "examples_per_second": seconds.rate(batch_size)}
    if tokens:
        figures["tokens_per_second"] = seconds.rate(batch_size * tokens)
    figures |= {"flops_per_second": rate, "mfu": rate.over(devices * peak.flops)}
    return {
        **{name: dataclasses.asdict(figure) for name, figure in figures.items()},
        "matrix_flops_per_step": flops,
        "peak_flops_per_second": devices * peak.flops,
        "peak_source": peak.source + (f", times {devices}" if devices > 1 else ""),
    }


def measure_data(
    config: ConfigDict, *, windows: int, seconds: float = 0.5, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Reads batches as training does, and does nothing with them.

    Args:
      config: the experiment; its dataset must have been prepared.
      windows: how many times to measure.
      seconds: length of a window, at least.
      clock: seconds.

    Returns:
      first_pass_examples_per_second: of the first epoch, or of a minute of it: records are read and decoded.
      first_pass_processor_seconds: of an example, over all cores, what was read ahead included; None where other
        processes decode.
      first_pass_share: of the epoch that was read before the windows.
      examples_per_second: {"median", "low", "high"} afterwards: with `config.data.cache`, records come from memory.
      cache, workers, processes: of `config.data`.

    Raises:
      UserError: if the dataset is missing.
    """
    tokenizer = load_tokenizer(config.data) if config.data.text_length else None
    data = locate_precomputed(config, tokenizer).data
    stream = open_stream(data, tokenizer, split=data.split, seed=config.seed, train=True, batch_size=config.batch_size)
    rows = process_rows(batch_sharding(make_mesh(config.mesh)), config.batch_size)
    reader = BatchReader(
        stream,
        batch_size=config.batch_size,
        rows=rows,
        examples_seen=0,
        workers=data.workers,
        read_ahead=data.read_ahead,
        processes=data.processes,
    )

    def read(enough: Callable[[int, float], bool]) -> tuple[int, float]:
        """Examples read, and the seconds that it took, when that is enough; of all processes."""
        start, count, elapsed = clock(), 0, 0.0
        while not enough(count, elapsed):
            next(reader)
            count, elapsed = count + config.batch_size, clock() - start
        return count, elapsed

    with contextlib.closing(reader):
        used = time.process_time()
        first, took = read(lambda count, elapsed: count >= stream.epoch_size or elapsed >= _FIRST_PASS_SECONDS)
        used = (time.process_time() - used) / first
        later = [read(lambda _, elapsed: elapsed >= seconds) for _ in range(windows)]
    return {
        "first_pass_examples_per_second": first / took,
        "first_pass_processor_seconds": None if data.processes else used,
        "first_pass_share": min(1.0, first / stream.epoch_size),
        "examples_per_second": dataclasses.asdict(Spread.of([count / elapsed for count, elapsed in later])),
        "cache": data.cache,
        "workers": data.workers,
        "processes": data.processes,
    }


def measure_sample(config: ConfigDict, *, windows: int, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Times one call of the objective's sampler, with random weights, at the size that `python -m sample` draws in.

    Returns:
      images: in a call; seconds (of a call), images_per_second as {"median", "low", "high"}; compile_seconds; and
      the sampler's settings.

    Raises:
      UserError: if nothing can be sampled from the objective, or it does not fit.
    """
    config = without_sources(config)
    config.update({"batch_size": CHUNK, "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "microbatches": 1}})
    sampler = create_sampler(config)
    program = create_program(config, make_mesh(config.mesh, jax.local_devices()[:1]))
    too_large = _memory_errors(f"drawing {CHUNK} pictures at once", "leave sampling out")
    with too_large, program.in_mesh():
        batch, frozen = made_up_batch(program, config), load_frozen(config, config.seed, program.abstract_frozen)
        params, variables = jax.jit(program.objective.init)(jax.random.key(config.seed), batch)
        request = sampler.request(**{name: np.asarray(batch[name]) for name in sampler.reads if name in batch})
        keys = jax.random.split(jax.random.key(config.seed), CHUNK)

        def run(count: int) -> None:
            for _ in range(count):
                jax.block_until_ready(sampler(params, variables, frozen, request, keys))

        start = clock()
        run(1)
        first = clock() - start
        seconds = time_windows(run, windows=windows, steps=1, warmup=0, clock=clock)
    return {
        "images": CHUNK,
        "seconds": dataclasses.asdict(seconds),
        "images_per_second": dataclasses.asdict(seconds.rate(CHUNK)),
        "compile_seconds": max(0.0, first - seconds.median),
        "settings": sampler.settings,
    }


def describe_devices() -> dict[str, Any]:
    """`describe_environment`, and what else a figure depends on: devices, cores, and other work on the machine."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        **describe_environment(),
        "platform_name": jax.devices()[0].platform,
        "device_count": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": load,
    }


def dtype_of(config: ConfigDict) -> str:
    """What the trained networks compute in: "bfloat16" if any of them does, else "float32"."""
    dtypes = {jnp.dtype(model.get("dtype", "float32")).name for model in config.models.values()}
    return "bfloat16" if "bfloat16" in dtypes else "float32"


def tokens_of(config: ConfigDict) -> int:
    """Text and image tokens of an example that the trained networks are given; 0 for networks of pictures."""
    networks = [create_model(**model_of(entry)) for entry in config.models.values()]
    text = sum(config.data.text_length for network in networks if hasattr(network, "text_length"))
    return text + sum(getattr(network, "image_length", 0) for network in networks)


def _vocabularies(config: ConfigDict) -> Mapping[str, int]:
    """Ids that every network of the config takes, by field of a batch."""
    models = [*config.models.values(), *config.frozen.values()]
    fields = {"text": "text_vocab_size", "image_tokens": "image_vocab_size"}
    return {
        name: min(model[field] for model in models if field in model)
        for name, field in fields.items()
        if any(field in model for model in models)
    }


def program_bytes(planned: Any) -> int | None:
    """What a compiled program occupies on a device at its peak, arguments included.

    Backends differ in what they leave out: `peak_memory_in_bytes` has no temporary buffers on a CPU, and on a TPU
    `temp_size_in_bytes` of a small program is 0.

    Args:
      planned: `memory_analysis()` of a compiled program; None where the backend has none.
    """
    if planned is None:
        return None
    held = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
    return max(planned.peak_memory_in_bytes, held + planned.temp_size_in_bytes)


def _page_faults() -> int:
    """Pages that this process was given so far without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _memory(compiled: Any) -> dict[str, Any]:
    """Peak memory: the device's own count where it keeps one, what the compiler planned, and the process's."""
    stats = jax.local_devices()[0].memory_stats()
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "device_peak_bytes": stats["peak_bytes_in_use"] if stats else None,
        "program_peak_bytes": program_bytes(compiled.memory_analysis()),
        "resident_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,  # compilation included
    }


@contextlib.contextmanager
def _memory_errors(what: str, advice: str) -> Iterator[None]:
    """Turns a device's refusal of memory into a UserError that says what does not fit, and what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        machine = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        raise UserError(f"{what} does not fit {machine}; {advice}") from error
