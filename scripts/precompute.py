"""`python -m scripts.precompute --config=FILE`: stores what a frozen network makes of a dataset's pictures."""

from collections.abc import Sequence

from cli import entry_point
from cli.config import load_config
from cli.errors import UserError

_DESCRIPTION = """\
Computes the image tokens of a dataset once, with the frozen image tokenizer of a config, and stores them beside the
dataset. Training with --config.data.image_tokens=auto then reads them in place of the pictures, and has the losses
that it has without. They are found by a hash of the tokenizer's weights: those of other weights, of another size,
transform or dataset are never used, and may lie beside.

  --config=FILE[:ARGUMENT]   of the run that will read them; --config.KEY=VALUE overrides a key

Interrupted at any moment and started again, it goes on where it was and ends with the same files. A transform that
draws (config.data.transform=dalle_training, for one) shows a picture in another way in every epoch. Of it, --views=K
are stored; epoch e sees view e modulo K. Captions are chosen, and their merges passed over, anew as ever.
"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and computes."""
    parser = entry_point.parser("scripts.precompute", _DESCRIPTION)
    parser.add_argument("--views", type=int, default=0, metavar="K", help="of each picture, of a transform that draws")
    parser.add_argument(
        "--splits",
        default="",
        metavar="A,B",
        help="splits, as evaluation sees them (default: what the config trains on)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at once (default 64)")
    options, rest = parser.parse_known_args(arguments)
    config = load_config(rest)
    if options.views < 0 or options.batch_size < 1:
        raise UserError("--views must not be negative, and --batch_size must be at least 1")

    from train.precomputed import precompute
    from weights.sources import resolve_frozen

    resolve_frozen(config)
    splits = [split.strip() for split in options.splits.split(",") if split.strip()]
    folder = precompute(config, splits=splits, views=options.views, batch_size=options.batch_size)
    print(f"{folder}: train with --config.data.image_tokens=auto")


if __name__ == "__main__":
    entry_point.run(main)
