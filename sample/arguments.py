"""Command-line arguments that choose weights and sampling settings, for every command that samples."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cli.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setting:
    """An option that overrides a key of `config.sample`.

    Attributes:
      kind: of its values.
      help: what `--help` says.
      group: the heading under which it says so; "" for none.
      besides: whether it is of a row that only a user gives, beside what a sampler reads of records.
    """

    kind: type
    help: str
    group: str = ""
    besides: bool = False


_DIFFUSION = "sampling of a diffusion (defaults: the run's config)"

DTYPES = ("float32", "bfloat16")

# The settings of all samplers; which of them a run has, its sampler says.
SETTINGS: Mapping[str, Setting] = {
    "guidance": Setting(float, "default: the run's config.sample.guidance"),
    "temperature": Setting(float, "0 is greedy; default: the run's config"),
    "top_k": Setting(int, "0 for all; default: the run's config"),
    "top_p": Setting(float, "1 for all; default: the run's config"),
    "answer_length": Setting(int, "tokens of an answer at most; default: the run's config"),
    "caption_length": Setting(int, "tokens of a caption at most; default: the run's config"),
    "beams": Setting(int, "of a search for the likeliest caption; 0 for none; default: the run's config"),
    "length_penalty": Setting(float, "of that: 1 compares means of log p, 0 sums; default: the run's config"),
    "mode": Setting(
        str,
        "of a UniDiffuser: text_to_image, image_to_text, joint, image, text, image_variation, text_variation; default: "
        "what --prompt and --image ask for",
    ),
    "unconditional": Setting(
        str, "of a UniDiffuser: what guidance of a picture of a caption leads away from, noise or empty"
    ),
    "noise": Setting(str, "of a UniDiffuser: whose habits of drawing it, authors or diffusers; not in text_to_image"),
    "data_type": Setting(
        int,
        "of a UniDiffuser that tells kinds of data apart (version 1): 0 draws as pairs of the web, 1 as others; "
        "default: the kind that the run learned, of a converted one 1",
    ),
    "keep_rows": Setting(int, "rows of tokens kept of an --image to complete; default: half of them", besides=True),
    "strength": Setting(
        float,
        "how much a diffusion changes an --image: 0 not at all, 1 all of it; default: 0.8, with a --mask 1; of a "
        "UniDiffuser, which describes it without either",
        besides=True,
    ),
    "sampler": Setting(str, "such as ddpm, ddim, dpm_solver_multistep; a wrong one lists them all", _DIFFUSION),
    "steps": Setting(int, "of the sampler", _DIFFUSION),
    "spacing": Setting(str, "of its times, such as leading, trailing, karras; '' for its own", _DIFFUSION),
    "eta": Setting(float, "of ddim: 0 draws no noise, 1 as much as ddpm", _DIFFUSION),
    "churn": Setting(float, "of heun in schedule edm: noise added between its times; 0 for none", _DIFFUSION),
    "churn_min": Setting(float, "the noise level above which it is added", _DIFFUSION),
    "churn_max": Setting(float, "the noise level below which it is added; 0 for any", _DIFFUSION),
    "churn_noise": Setting(float, "standard deviation of what is added", _DIFFUSION),
    "times": Setting(str, "of a chain: even, or published, as the code of Stable Diffusion has them", _DIFFUSION),
    "offset": Setting(int, "of a chain: added to times of spacing leading; 1 in Stable Diffusion", _DIFFUSION),
    "end": Setting(str, "of ddim and plms: clean, or first, at the noise of a chain's first step", _DIFFUSION),
    "guided_channels": Setting(int, "how many channels are guided, the first ones; 0 for all", _DIFFUSION),
    "rescale": Setting(float, "0 to 1: of guided pictures, to the spread of unguided ones", _DIFFUSION),
    "guidance_start": Setting(float, "share of the process before which there is none", _DIFFUSION),
    "guidance_stop": Setting(float, "share of the process after which there is none", _DIFFUSION),
}


# Setting -> (its value without effect, the setting whose value makes all others so, that value).
_IDLE = {
    **{"rescale": (0.0, "guidance", 1.0), "guidance_start": (0.0, "guidance", 1.0)},
    **{"guidance_stop": (1.0, "guidance", 1.0), "guided_channels": (0, "guidance", 1.0)},
    "unconditional": ("noise", "guidance", 1.0),
    **{"churn_min": (0.0, "churn", 0.0), "churn_max": (0.0, "churn", 0.0), "churn_noise": (1.0, "churn", 0.0)},
    "length_penalty": (1.0, "beams", 0),
    **{"top_k": (0, "temperature", 0.0), "top_p": (1.0, "temperature", 0.0)},
}
_MEANS = {
    "guidance": "guidance 1 means none",
    "temperature": "temperature 0 takes the most likely token",
    "churn": "churn 0 adds no noise",
    "beams": "beams 0 searches nothing",
}


def idle_settings(
    given: Mapping[str, Any], defaults: Mapping[str, Any], swept: Mapping[str, Sequence[Any]] | None = None
) -> list[tuple[str, str]]:
    """Settings that were chosen and have no effect, each with the reason.

    Args:
      given: overrides of `config.sample`; if there are none, the defaults are what was chosen.
      defaults: `config.sample`.
      swept: values of settings that differ between cells: there is an effect if one cell has it.
    """
    swept = swept or {}
    chosen = {**{name: (value,) for name, value in given.items()}, **swept} or {k: (v,) for k, v in defaults.items()}
    found = []
    for name, (without, other, _) in _IDLE.items():
        others = swept.get(other) or (given.get(other, defaults.get(other)),)
        why = [silenced(name, one) for one in others]
        if any(one != without for one in chosen.get(name, ())) and all(why):
            found.append((name, why[0]))
    return found


def silenced(name: str, other: Any) -> str:
    """Why a setting is not read, whatever its value, beside a value of the one that silences it; "" where it is read.

    Such as "guidance 1 means none" of "unconditional" beside guidance 1.
    """
    _, by, value = _IDLE[name]
    return _MEANS[by] if other == value else ""


def add_sampling_arguments(parser: argparse.ArgumentParser, besides: bool = True) -> None:
    """Adds the run, its checkpoint, the seed, and overrides of `config.sample`.

    Args:
      parser: of the command.
      besides: whether the command takes rows that only a user gives, and so their settings.
    """
    parser.add_argument("--run", required=True, help="the run folder, also gs://BUCKET/NAME")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--no_ema", action="store_true", help="use the parameters, not their moving average")
    parser.add_argument(
        "--ema",
        type=float,
        metavar="LENGTH",
        help="a moving average made of those that training kept (config.ema.lengths), such as 0.1; 0 for the "
        "parameters, 1 for the run's own average (default)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what networks compute in (default: as the run's config says); norms, softmax and a first stage, which "
        "makes pictures of latents, stay as they are",
    )
    parser.add_argument("--guide_run", metavar="RUN", help="a weaker diffusion that guidance leads away from")
    parser.add_argument("--guide_step", type=int, metavar="STEP", help="its checkpoint (default: the newest)")
    parser.add_argument("--seed", type=int, default=0)
    places: dict[str, Any] = {"": parser}
    for name, setting in SETTINGS.items():
        if setting.besides and not besides:
            continue
        if setting.group not in places:
            places[setting.group] = parser.add_argument_group(setting.group)
        places[setting.group].add_argument(f"--{name}", type=setting.kind, help=setting.help)


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the overrides of `config.sample` that were given."""
    return {name: value for name in SETTINGS if (value := getattr(options, name, None)) is not None}


def chosen_average(options: argparse.Namespace) -> bool | float:
    """Which weights were asked for: True for the run's moving average, False for none, or a length.

    Raises:
      UserError: if both options say something.
    """
    if options.ema is not None and options.no_ema:
        raise UserError("--ema and --no_ema are both given; leave one of them out")
    return average_of(float(not options.no_ema) if options.ema is None else options.ema)


def average_of(number: float) -> bool | float:
    """What `--ema` means: 0 and 1 as False and True."""
    return bool(number) if number in (0, 1) else number


def open_trained(options: argparse.Namespace, ema: bool | float, step: int | None) -> Any:
    """The run that was asked for, guided if it is to be; a `sample.trained.TrainedSampler`.

    Args:
      options: of the command line.
      ema: see `chosen_average`.
      step: of the checkpoint, None for the newest.

    Raises:
      UserError: if there is no such run or checkpoint or average, or a guide does not fit.
    """
    from sample.trained import TrainedSampler  # imports jax

    if options.guide_step is not None and not options.guide_run:
        raise UserError("--guide_step is of a --guide_run; give that, or leave it out")
    trained = TrainedSampler.open(options.run, step=step, ema=ema, dtype=options.dtype or "")
    if options.ema == 1:
        trained.run.check_average(1.0, trained.weights.step)
    return trained.guided_by(options.guide_run, options.guide_step) if options.guide_run else trained
