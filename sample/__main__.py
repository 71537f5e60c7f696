"""`python -m sample --run=FOLDER --prompt=TEXT`: pictures and text from a trained run."""

import argparse
import json
import re
from collections.abc import Sequence

from cli import entry_point
from cli.allocator import reexec_with_fast_allocator
from cli.errors import UserError
from cli.locations import locate
from cli.ranges import check_seed
from sample.arguments import add_sampling_arguments, chosen_average, open_trained, sampling_settings
from sample.sheets.axes import parse_axes, read_texts

_DESCRIPTION = """\
Gives a trained run what it reads (captions, classes, pictures, or several of them) and writes what it makes of them
(pictures, text, or both) as a labelled grid, text under the pictures. Of several options it takes all combinations:
each picture with each prompt and each class. A run that is told nothing draws --num pictures; an image tokenizer shows
each picture beside its reconstruction; a DALL-E that is given --image with --prompt keeps the top of the picture and
draws the rest; a diffusion that is given --image changes it as much as --strength says, or draws it anew where --mask
is white; of a diffusion of points there is a figure: data noised, samples denoised, and where the network pulls.
What a run does not read is an error that names what it reads.
Sample i of a seed is the same whatever else is drawn. Guidance is uncond + w * (cond - uncond); 1 means none.

A sweep draws a table of cells, --num samples of each condition in a cell, with the same seed in each:
  --sweep guidance=1,2,4 --sweep steps=5,10,25 --prompt="a small red circle"
Its keys are the sampling settings below, seed, label, image, prompt and negative_prompt. Texts and names of pictures
are split at commas; those that have some come from a file, prompt=@FILE, one a line. The first key makes rows, the
second columns. Each further one makes pages, whose values stand in their titles and names: grid_seed_0.png,
grid_seed_1.png. Texts are numbered in names, as in grid_prompt_1.png, and a sampler's own spacing is "default". Every
cell is checked before any is drawn.
sweep.csv, beside --out, has a row for each cell as soon as that is drawn:
  the keys              their values in the cell
  seconds               to draw the cell; a program is compiled, and run for one picture, before it is first timed
  pictures, pictures_per_second
                        of the cell (or texts). Whole chunks of 64 are drawn: fewer pictures take as long
  accuracy              share of pictures with every attribute right that the caption names (scenes)
  clip_score            100 max(mean cosine of pictures and captions, 0), with --clip
  diversity             root mean square distance, pixels in [0, 1], averaged over all pairs of a prompt's pictures
  texts                 that were made, with " | " between them; only of a run that makes text
What does not apply is left empty.
"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and samples."""
    options = _parse(arguments)
    prompts = read_texts(options.prompt, "--prompt")
    if options.negative_prompt is not None and not options.negative_prompt.strip():
        raise UserError("--negative_prompt is empty, which is what guidance leads away from anyway; leave it out")
    given = [name for name, value in vars(options).items() if value not in (None, [])]
    axes = parse_axes(options.sweep, given)
    _check_together(options, [axis.name for axis in axes])
    check_seed("--seed", options.seed or 0)

    from sample.command import check_shown, draw_figure, draw_samples
    from sample.conditions import Order, make_conditions
    from sample.embedding import ClipEmbedder
    from sample.files import prepare_out, write_files, write_picture
    from sample.sheets.attention import draw_attention
    from sample.sheets.round_trip import draw_round_trip
    from sample.sheets.sweep import run_sweep
    from sample.sheets.trajectory import draw_trajectory  # imports jax, as those above

    trained = open_trained(options, chosen_average(options), options.step)
    if options.size:
        trained = trained.in_shape(options.size)
    check_shown(trained)
    seed, settings, out = options.seed or 0, sampling_settings(options), locate(options.out)
    files = locate(options.files) if options.files else None
    maps = locate(options.attention_maps) if options.attention_maps else None
    trained.check_settings(settings, {axis.name: axis.values for axis in axes})
    conditions = make_conditions(prompts, options.label, options.image, options.together)
    syntax = {"prompt_weights": options.prompt_weights, "long_prompts": options.long_prompts}
    order = Order(conditions, seed, settings, options.negative_prompt, options.mask, **syntax)
    prepare_out(out)
    if maps is not None:
        prepare_out(maps)
    # Of one picture there is one reconstruction, of a question one answer; but several ways to go on from its top.
    pictured = "image" in given or "image" in (axis.name for axis in axes)
    writes = trained.sampler.makes == ("text",)
    one = 1 if writes or (pictured and "image" in trained.sampler.reads) else None
    if options.keep > (num := options.num or one or 8):
        raise UserError(f"--keep={options.keep} must lie between 1 and --num={num}")
    if axes:
        clip = ClipEmbedder.open(options.clip) if options.clip else None
        drawn = run_sweep(trained, order, axes, options.num or one or 4, out, clip)
        written = ", ".join(str(path) for path in (*drawn.pages, drawn.table))
    else:
        if maps is not None:
            drawn, picture = draw_attention(trained, order, options.num or one or 4)
            write_picture(maps, picture)
            print(f"{maps}: attention to each token")
        elif options.trajectory is not None:
            drawn = draw_trajectory(trained, order, options.num or one or 4, options.trajectory)
        elif options.round_trip is not None:
            drawn = draw_round_trip(trained, order, options.num or 1, options.round_trip)
        elif "point" in trained.sampler.makes and not options.rerank:
            drawn = draw_figure(trained, order, options.num or 2000)
        else:
            clip = ClipEmbedder.open(options.rerank) if options.rerank else None
            drawn = draw_samples(trained, order, options.num or one or 8, clip, options.keep)
        write_picture(out, drawn.picture)
        written = str(out)
    if files is not None:
        write_files(files, drawn)
    print(f"{written}: {drawn} ({json.dumps(drawn.settings)})")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = entry_point.parser("sample", _DESCRIPTION)
    add_sampling_arguments(parser)
    parser.set_defaults(seed=None)  # tells a seed that is given from 0
    parser.add_argument("--prompt", action="append", default=[], help="a caption, or @FILE with one a line; repeatable")
    parser.add_argument(
        "--label",
        action="append",
        type=int,
        default=[],
        help="a class number; repeatable",
    )
    parser.add_argument("--negative_prompt", metavar="TEXT", help="what guidance leads away from (default: no caption)")
    parser.add_argument(
        "--prompt_weights",
        action="store_true",
        help="(words:1.3), (words) and [words] in prompts count more or less, where a CLIP reads them",
    )
    parser.add_argument(
        "--long_prompts", action="store_true", help="there, prompts beyond its context are read in chunks, and not cut"
    )
    parser.add_argument(
        "--image", action="append", default=[], help="a picture file, prepared as in training; repeatable"
    )
    parser.add_argument("--together", action="store_true", help="a prompt is about all of the pictures at once")
    parser.add_argument(
        "--mask",
        metavar="FILE",
        help="a picture file that lies on each --image, white where a diffusion draws that anew (default: all)",
    )
    parser.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="of a diffusion that trained on several shapes (config.data.buckets), which to draw, height and width in "
        "pixels, also of one in latents (default: the network's own square)",
    )
    parser.add_argument(
        "--num",
        type=int,
        help="samples of each condition (default 8; in a cell, trajectory or with attention maps 4; of a run that "
        "reads pictures, or makes text alone, 1), or points (2000)",
    )
    parser.add_argument(
        "--rerank", metavar="RUN", help="a CLIP, trained or converted, which sorts the pictures of each prompt"
    )
    parser.add_argument("--keep", type=int, default=0, help="how many it keeps of each prompt (default: all)")
    parser.add_argument(
        "--sweep", metavar="KEY=V1,V2,...", action="append", default=[], help="draws a table, see above; repeatable"
    )
    parser.add_argument("--clip", metavar="RUN", help="a CLIP, trained or converted, which scores the cells of a sweep")
    parser.add_argument(
        "--trajectory",
        metavar="N",
        nargs="?",
        type=int,
        const=8,
        help="of a diffusion: N (default 8) moments of each picture, x_t above and the network's estimate of x_0 below",
    )
    parser.add_argument(
        "--attention_maps",
        metavar="FILE",
        help="of a diffusion that reads captions: also a picture of which pixels read which token, averaged over "
        "heads, layers and steps, and of how much of their attention each token has",
    )
    parser.add_argument(
        "--round_trip",
        metavar="N",
        type=int,
        help="of a UniDiffuser: a --prompt to its picture, that to its caption, and on, N legs in a strip",
    )
    parser.add_argument("--out", default="grid.png", help="the grid (default grid.png)")
    parser.add_argument("--files", default="", help="also write pictures, texts and samples.json to this folder")
    return parser.parse_args(arguments)


def _size(text: str) -> tuple[int, int]:
    """Reads "48x80"."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no height and width; such as 48x80")
    return int(match[1]), int(match[2])


def _check_together(options: argparse.Namespace, swept: Sequence[str]) -> None:
    """Raises UserError if options do not go together.

    Args:
      options: of the command line.
      swept: names of axes.
    """
    if options.num is not None and options.num < 1:
        raise UserError(f"--num must be at least 1, not {options.num}")
    if options.together and (len(options.image) < 2 or "image" in swept):
        raise UserError("--together shows several pictures at once; give --image for each of them, outside of --sweep")
    if options.keep and not options.rerank:
        raise UserError("--keep needs --rerank=RUN, a CLIP that chooses")
    if options.keep < 0:
        raise UserError(f"--keep={options.keep} must be at least 1")
    if options.clip and not swept:
        raise UserError("--clip scores the cells of a --sweep; to choose among pictures, give --rerank=RUN")
    if options.rerank and (swept or options.trajectory is not None):
        raise UserError("--rerank chooses among the pictures of a plain grid; leave out --sweep and --trajectory")
    tripped = options.round_trip is not None
    if tripped and (swept or options.trajectory is not None or options.rerank):
        raise UserError("--round_trip is a picture of its own; leave out --sweep, --trajectory and --rerank")
    if options.attention_maps and (swept or options.rerank or options.trajectory is not None or tripped):
        raise UserError(
            "--attention_maps is of the pictures of a plain grid; leave out --sweep, --rerank, --trajectory and "
            "--round_trip"
        )
    if options.attention_maps and locate(options.attention_maps) == locate(options.out):
        raise UserError(f"--attention_maps and --out are both {options.out}; give each a file of its own")
    if swept and options.trajectory is not None:
        raise UserError("--sweep and --trajectory are two different pictures; leave one of them out")


if __name__ == "__main__":
    reexec_with_fast_allocator()
    entry_point.run(main)
