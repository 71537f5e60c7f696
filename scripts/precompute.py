"""`python -m scripts.precompute --config=FILE`: stores what frozen networks make of a dataset."""

from collections.abc import Sequence

from cli import entry_point
from cli.config import load_config
from cli.errors import UserError

_DESCRIPTION = """\
Computes once what the frozen networks of a config make of a dataset, and stores it beside the dataset: image tokens
(of config.frozen.dvae), moments of latents (of config.frozen.first_stage) and CLIP's embeddings in place of pictures,
features of all captions (of config.frozen.text or config.frozen.clip) or a captioner's latents beside their ids.
Training with --config.data.FIELD=auto, FIELD being image_tokens, latent_moments, image_features, text_features,
token_features or caption_latents, then reads them, and has the losses that it has without; latents are drawn of their
moments anew in every step. They are found by a hash of the network's weights: those of other
weights, of another size, transform, tokenizer or dataset are never used, and may lie beside.

  --config=FILE[:ARGUMENT]   of the run that will read them; --config.KEY=VALUE overrides a key

Interrupted at any moment and started again, it goes on where it was and ends with the same files. A transform that
draws (config.data.transform=dalle_training, for one) shows a picture in another way in every epoch. Of it, --views=K
are stored; epoch e sees view e modulo K. Which caption of a picture is read is drawn anew as ever; its merges are
(config.data.bpe_dropout) where no features of captions are stored.
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
    parser.add_argument("--fields", default="", metavar="A,B", help="which (default: all that the config can read)")
    options, rest = parser.parse_known_args(arguments)
    config = load_config(rest)
    if options.views < 0 or options.batch_size < 1:
        raise UserError("--views must not be negative, and --batch_size must be at least 1")

    from data.precomputed import MADE_OF
    from train.feature_pass import precompute
    from train.precomputed import precomputable
    from weights.sources import resolve_frozen

    able = precomputable(config)
    names = _listed(options.fields) or able
    if wrong := [name for name in names if name not in able]:
        raise UserError(f"--fields has {wrong[0]}; of this config there can be {', '.join(able)}")
    if options.views and not any(MADE_OF[name] == "image" for name in names):
        raise UserError("--views is of pictures, and only captions are read; leave it out")
    resolve_frozen(config)
    for name in names:
        views = options.views if MADE_OF[name] == "image" else 0
        splits = _listed(options.splits)
        folder = precompute(config, name, splits=splits, views=views, batch_size=options.batch_size)
        print(f"{folder}: train with --config.data.{name}=auto")


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


if __name__ == "__main__":
    entry_point.run(main)
