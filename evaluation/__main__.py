"""`python -m evaluation --run=FOLDER`: numbers for a trained run."""

from collections.abc import Sequence

from cli import command
from cli.allocator import reexec_with_fast_allocator
from cli.errors import UserError
from sample.arguments import add_sampling_arguments, sampling_settings

_DESCRIPTION = """\
Evaluates a run and writes evaluation.json beside its checkpoints.

caption_accuracy   share of captions whose picture has every attribute right, and each attribute (embedded dataset)
reconstruction     error of an image tokenizer, codes it uses, and scenes still read right after it
"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and evaluates."""
    parser = command.parser("evaluation", _DESCRIPTION)
    add_sampling_arguments(parser)
    parser.add_argument("--metrics", default="", help="comma-separated (default: all that apply)")
    parser.add_argument("--splits", default="validation,held_out", help="comma-separated (default validation,held_out)")
    parser.add_argument("--num", type=int, default=1000, help="pictures of each split (default 1000)")
    options = parser.parse_args(arguments)
    if options.num < 1:
        raise UserError(f"--num must be at least 1, not {options.num}")

    from evaluation.command import evaluate_run  # imports jax
    from evaluation.records import format_table, write_records
    from sample.trained import TrainedSampler

    trained = TrainedSampler.open(options.run, step=options.step, ema=not options.no_ema)
    settings = sampling_settings(options)
    metrics = [name for name in options.metrics.split(",") if name]
    records = evaluate_run(trained, metrics, options.splits.split(","), options.num, options.seed, settings)
    write_records(trained.run, records)
    print(format_table(records))


if __name__ == "__main__":
    reexec_with_fast_allocator()
    command.run(main)
