"""`python -m sample --run=FOLDER --prompt=TEXT`: pictures from a trained run."""

import json
from collections.abc import Sequence
from pathlib import Path

from cli import command
from cli.allocator import reexec_with_fast_allocator
from cli.errors import UserError

_DESCRIPTION = """\
Draws captions with a trained run, or passes pictures through a trained image tokenizer, and writes a labelled grid.
Image i of a seed is the same whatever else is drawn. Guidance is uncond + w * (cond - uncond); 1 means none.
"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and samples."""
    parser = command.parser("sample", _DESCRIPTION)
    parser.add_argument("--run", required=True, help="the run folder")
    parser.add_argument("--prompt", action="append", default=[], help="a caption, or @FILE with one a line; repeatable")
    parser.add_argument("--image", action="append", default=[], help="a picture to reconstruct; repeatable")
    parser.add_argument("--num", type=int, default=8, help="pictures for each prompt (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="default: the run's config.sample.guidance")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the run's config")
    parser.add_argument("--top_k", type=int, help="0 for all; default: the run's config")
    parser.add_argument("--top_p", type=float, help="1 for all; default: the run's config")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--no_ema", action="store_true", help="use the parameters, not their moving average")
    parser.add_argument("--out", default="grid.png", help="the grid (default grid.png)")
    parser.add_argument("--files", default="", help="also write each picture and samples.json to this folder")
    options = parser.parse_args(arguments)
    if options.num < 1:
        raise UserError(f"--num must be at least 1, not {options.num}")
    if bool(options.prompt) == bool(options.image):
        raise UserError("give --prompt=TEXT, or --image=FILE for a run that reconstructs pictures")
    prompts = _read_prompts(options.prompt)
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty; describe a picture, for example --prompt='a small red circle'")

    from sample.command import draw_prompts, reconstruct, write_files  # imports jax
    from sample.trained import TrainedSampler

    trained = TrainedSampler.open(options.run, step=options.step, ema=not options.no_ema)
    names = ("guidance", "temperature", "top_k", "top_p")
    settings = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if prompts:
        drawn = draw_prompts(trained, prompts, options.num, options.seed, settings)
    else:
        drawn = reconstruct(trained, options.image)
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
