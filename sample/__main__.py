"""`python -m sample --run=FOLDER --prompt=TEXT`: pictures from a trained run."""

import json
from collections.abc import Sequence
from pathlib import Path

from cli import command
from cli.allocator import reexec_with_fast_allocator
from cli.errors import UserError
from data.points import is_points
from sample.arguments import add_sampling_arguments, sampling_settings

_DESCRIPTION = """\
Draws captions with a trained run, or passes pictures through a trained image tokenizer, and writes a labelled grid. Of
a diffusion of points it writes a figure: data noised, samples denoised, and where the network pulls.
Image i of a seed is the same whatever else is drawn. Guidance is uncond + w * (cond - uncond); 1 means none.
"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and samples."""
    parser = command.parser("sample", _DESCRIPTION)
    add_sampling_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], help="a caption, or @FILE with one a line; repeatable")
    parser.add_argument("--image", action="append", default=[], help="a picture to reconstruct; repeatable")
    parser.add_argument("--num", type=int, help="pictures for each prompt (default 8), or points of a figure (2000)")
    parser.add_argument("--rerank", metavar="RUN", help="a trained CLIP, which sorts the pictures of each prompt")
    parser.add_argument("--keep", type=int, default=0, help="how many it keeps of each prompt (default: all)")
    parser.add_argument("--out", default="grid.png", help="the grid (default grid.png)")
    parser.add_argument("--files", default="", help="also write each picture and samples.json to this folder")
    options = parser.parse_args(arguments)
    if options.num is not None and options.num < 1:
        raise UserError(f"--num must be at least 1, not {options.num}")
    if options.prompt and options.image:
        raise UserError("give --prompt=TEXT, or --image=FILE for a run that reconstructs pictures; not both")
    if options.keep and not options.rerank:
        raise UserError("--keep needs --rerank=RUN, a trained CLIP that chooses")
    num = options.num or 8
    if not 0 <= options.keep <= num:
        raise UserError(f"--keep={options.keep} must lie between 1 and --num={num}")
    prompts = _read_prompts(options.prompt)
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty; describe a picture, for example --prompt='a small red circle'")

    from sample.command import draw_figure, draw_prompts, reconstruct, write_files  # imports jax
    from sample.embedding import ClipEmbedder
    from sample.trained import TrainedSampler

    trained = TrainedSampler.open(options.run, step=options.step, ema=not options.no_ema)
    if trained.config.objective == "clip":
        raise UserError(
            f"{options.run} is a CLIP, which draws nothing; give it to --rerank, or to python -m evaluation"
        )
    settings = sampling_settings(options)
    trained.check_settings(settings)
    if is_points(trained.config.data.dataset):
        if prompts or options.image:
            raise UserError(f"{options.run} draws points and takes neither --prompt nor --image; leave them out")
        drawn = draw_figure(trained, options.num or 2000, options.seed, settings)
    elif prompts:
        clip = ClipEmbedder.open(options.rerank) if options.rerank else None
        drawn = draw_prompts(trained, prompts, num, options.seed, settings, clip, options.keep)
    elif options.image:
        drawn = reconstruct(trained, options.image)
    else:
        raise UserError("give --prompt=TEXT, or --image=FILE for a run that reconstructs pictures")
    try:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        drawn.picture.save(options.out)
        if options.files:
            write_files(Path(options.files), drawn)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {options.out}: {error}; give --out a .png path that can be written") from error
    print(f"{options.out}: {len(drawn.images)} pictures ({json.dumps(drawn.settings)})")


def _read_prompts(values: Sequence[str]) -> list[str]:
    prompts: list[str] = []
    for value in values:
        if value.startswith("@"):
            path = Path(value[1:])
            if not path.is_file():
                raise UserError(f"there is no prompt file {path}")
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            prompts += [line for line in lines if line]
            if not any(lines):
                raise UserError(f"the prompt file {path} is empty; write one caption a line")
        else:
            prompts.append(value)
    return prompts


if __name__ == "__main__":
    reexec_with_fast_allocator()
    command.run(main)
