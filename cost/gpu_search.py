"""How few GPUs of a kind hold a step, with which microbatches, split and recomputation: by estimates, no compiler."""

from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

from cli.errors import UserError
from cost.chips import GIB, GPU_COUNTS, Gpu
from cost.search import Candidate, Shapes, too_small, ways
from cost.temporaries import FACTOR


def gpu_candidates(config: ConfigDict, most: int) -> list[list[Candidate]]:
    """Ways to run a step on one machine, a list for each number of GPUs; see `cost.search.candidates`."""
    return ways(config, [("", count, count) for count in GPU_COUNTS if count <= most])


def search_gpus(
    config: ConfigDict,
    machines: Iterable[list[Candidate]],
    *,
    gpu: Gpu,
    shapes: Shapes,
    say: Callable[[Candidate, str], None],
) -> tuple[Candidate, bool] | None:
    """The first way whose arguments, which are exact, and estimated temporaries are what a program may use.

    Args:
      config: an experiment.
      machines: of `gpu_candidates`.
      gpu: the kind.
      shapes: arithmetic, of programs with the fused attention of GPUs.
      say: is told each outcome.

    Returns:
      the way, and whether it fits too if the temporaries are larger by the factor of the estimate; None if none fits.
    """
    for on_machine in machines:
        if why := too_small(shapes, on_machine[0].devices, gpu.usable_bytes):
            say(on_machine[0], why)
            continue
        for way in on_machine:
            if (surely := _asked(config, way, gpu, shapes, say)) is not None:
                return way, surely
    return None


def _asked(
    config: ConfigDict, way: Candidate, gpu: Gpu, shapes: Shapes, say: Callable[[Candidate, str], None]
) -> bool | None:
    """Whether a way that fits does so surely; None if it does not fit."""
    changed = way.apply(config)
    try:
        arguments = shapes.argument_bytes(changed, way.devices)
        if arguments > gpu.usable_bytes:
            say(way, f"does not fit: {_of(arguments, gpu)}, arguments alone")
            return None
        temporary = shapes.temporary_bytes(changed, way.devices)
    except UserError as error:
        say(way, f"impossible: {error}")
        return None
    needed = arguments + temporary
    if needed > gpu.usable_bytes:
        say(way, f"does not fit: {_of(needed, gpu)}, by an estimate")
        return None
    sure = arguments + FACTOR * temporary <= gpu.usable_bytes
    say(way, f"fits: {_of(needed, gpu)}, by an estimate{'' if sure else ' that is too close to be sure of'}")
    return sure


def _of(needed: int, gpu: Gpu) -> str:
    return f"{needed / GIB:.2f} of {gpu.usable_bytes / GIB:.2f} GiB"
