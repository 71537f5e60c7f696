"""What some metrics take beside the run, and whether the metrics that are asked for read it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cli.errors import UserError
from evaluation.caption_scores import CAPTION_SCORES
from evaluation.clip.metrics import ClipSettings
from evaluation.clip.reranking import SCORED, ClipScorer
from evaluation.features.metrics import FEATURE_METRICS, FeatureSettings
from sample.trained import TrainedSampler


@dataclasses.dataclass(frozen=True)
class Tools:
    """What some metrics take beside the run.

    Attributes:
      features: how features are made, for the metrics that compare them; None if the user gave no extractor.
      scorer: the CLIP that scores drawn pictures; None if the user named none.
      clip: what a CLIP run tells apart.
    """

    features: FeatureSettings | None = None
    scorer: ClipScorer | None = None
    clip: ClipSettings = ClipSettings()


def check_tools(trained: TrainedSampler, names: Sequence[str], drawn: Sequence[str], tools: Tools) -> None:
    """Looks at what was given beside the run.

    Args:
      trained: the run, perhaps with another one that guides it.
      names: the metrics.
      drawn: those of them that draw.
      tools: what was given.

    Raises:
      UserError: if a metric lacks what it needs, or none of them reads what was given.
    """
    if tools.scorer is None and set(names) & set(SCORED):
        raise UserError(f"{' and '.join(SCORED)} need a CLIP that scores; give --clip=RUN")
    given: list[tuple[str, Any, Sequence[str]]] = [
        ("--clip", tools.scorer, (*SCORED, CAPTION_SCORES)),
        ("--features", tools.features, FEATURE_METRICS),
    ]
    if "features" not in trained.sampler.makes:
        fields = [field.name for field in dataclasses.fields(ClipSettings)]
        given += [(f"--{one}", getattr(tools.clip, one) != getattr(ClipSettings(), one), ()) for one in fields]
    for option, tool, readers in (("--guide_run", trained.guide, drawn), *given):
        if tool and not set(names) & set(readers):
            others = f"; --metrics of {', '.join(readers)} read it" if readers else ""
            raise UserError(f"{option} has no effect on {' and '.join(names)}; leave it out{others}")
