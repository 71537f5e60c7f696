"""What a diffusion is drawn with: the solver that its program is compiled for, and the numbers of guidance."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from cli.errors import UserError
from diffusion.plan import Plan

CHURN = ("churn", "churn_min", "churn_max", "churn_noise")
NUMBERS = ("guidance", "rescale", "guidance_start", "guidance_stop")
_OF_SOME_TIMES: Mapping[str, object] = {"offset": 0, "end": "clean"}  # each with its value without effect


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a sampler is compiled for, beside the batch.

    Attributes:
      sampler: see `diffusion.solver_choice.SOLVERS`.
      steps: S.
      spacing: of the times; "" for the sampler's own.
      eta: of DDIM.
      churn: of Heun's method, as the three that follow; see `diffusion.solver_choice.make_plan`.
      churn_min: the noise level above which noise is added.
      churn_max: the one below which; 0 for any.
      churn_noise: standard deviation of what is added.
      guided_channels: how many of the data's channels, the first ones, are guided; 0 for all. The others follow the
        condition alone: 3 of 4 in the published code of DiT.
      times: of a chain, as the two that follow; see `diffusion.solver_choice.make_plan`. "even" or "published".
      offset: added to times of spacing "leading".
      end: "clean" or "first".
    """

    sampler: str = "dpm_solver_multistep"
    steps: int = 25
    spacing: str = ""
    eta: float = 0.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = 0.0
    churn_noise: float = 1.0
    guided_channels: int = 0
    times: str = "even"
    offset: int = 0
    end: str = "clean"


def check_numbers(numbers: Mapping[str, float]) -> None:
    """Raises UserError unless guidance is possible."""
    checks: tuple[tuple[str, Callable[[float], bool], str], ...] = (
        ("guidance", lambda w: 0 <= w < float("inf"), "1 means none, more follows the prompt more, 0 ignores it"),
        ("rescale", lambda phi: 0 <= phi <= 1, "use 0 for none to 1 for all of it"),
        ("guidance_start", lambda share: 0 <= share <= 1, "use a share of the process, 0 to 1"),
        ("guidance_stop", lambda share: 0 <= share <= 1, "use a share of the process, 0 to 1"),
    )
    for name, possible, advice in checks:
        if not possible(numbers[name]):
            raise UserError(f"{name}={numbers[name]} is impossible; {advice}")


def unread_times(steps: Steps, plan: Callable[[Steps], Plan]) -> dict[str, str]:
    """Settings of times that a solver has no use for, each with the reason.

    Args:
      steps: the settings, which are possible.
      plan: what the solver makes of them.
    """
    unread: dict[str, str] = {}
    for name, without in _OF_SOME_TIMES.items():
        if getattr(steps, name) == without:
            continue
        try:
            plans = [plan(each) for each in (steps, dataclasses.replace(steps, **{name: without}))]
        except ValueError:  # without it there is none, as of one published step that would begin where it ends
            continue
        pairs = zip(*([getattr(one, field.name) for field in dataclasses.fields(one)] for one in plans), strict=True)
        if all(np.array_equal(given, other) for given, other in pairs):
            spacing = f" with spacing {steps.spacing}" if steps.spacing else ""
            unread[name] = f"the times of {steps.sampler}{spacing} are the same without it"
    return unread
