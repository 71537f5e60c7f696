"""`python -m train --config=FILE[:ARGUMENT] --workdir=FOLDER [--config.KEY=VALUE ...]`."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from cli import entry_point
from cli.allocator import reexec_with_fast_allocator
from cli.config import load_config
from cli.errors import EXIT_PREEMPTED, UserError

_DESCRIPTION = """\
Trains what a config says, in a run folder; started again, it continues from the newest checkpoint.

  --config=FILE[:ARGUMENT]   the config, such as configs/scenes/dvae.py or configs/scenes/dalle.py:debug
  --config.KEY=VALUE         overrides one key, such as --config.steps=1000 or --config.optimizer.schedule.peak=1e-3

Exit codes: 0 finished; 75 stopped by a signal, saved, start it again; 2 a mistake, said in one line; 1 anything else.
"""


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and trains."""
    parser = entry_point.parser("train", _DESCRIPTION)
    parser.add_argument("--workdir", required=True, help="the run folder, also gs://BUCKET/NAME")
    parser.add_argument(
        "--distributed",
        default="",
        metavar="WHERE",
        help="how the processes of a run find each other: HOST:PORT,PROCESSES,INDEX, or auto, or none "
        "(default: auto on Cloud TPU and in a SLURM step of several tasks, else none)",
    )
    parser.add_argument(
        "--profile",
        type=int,
        metavar="N",
        help="trace N updates, after the first, into WORKDIR/profile; docs/performance.md says how to read it",
    )
    options, rest = parser.parse_known_args(arguments)
    config = load_config(rest)
    if not options.workdir:
        raise UserError("--workdir is empty; name a folder such as runs/dvae")
    if options.profile is not None and options.profile < 1:
        raise UserError(f"--profile must be at least 1, not {options.profile}")

    # Until there is something to save, a stop loses nothing.
    signal.signal(signal.SIGTERM, _leave)
    # These import jax, which takes seconds that a mistake should not cost.
    from train.distributed.processes import join_processes
    from train.loop import train

    join_processes(options.distributed)
    return train(config, options.workdir, profile=options.profile or 0)


def _leave(number: int, frame: FrameType | None) -> None:
    print("SIGTERM: training had not begun; start the same command again", file=sys.stderr)
    sys.exit(EXIT_PREEMPTED)


if __name__ == "__main__":
    reexec_with_fast_allocator()
    entry_point.run(main)
