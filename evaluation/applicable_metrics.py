"""Which metrics a run has: they follow from what its sampler reads and makes."""

from collections.abc import Sequence

from cli.errors import UserError
from data.scenes import find_world
from evaluation.answer_perplexity import ANSWER_PERPLEXITY
from evaluation.answers import ANSWERS
from evaluation.caption_scores import CAPTION_SCORES
from evaluation.clip.metrics import CLIP_METRICS, ClipSettings, default_metrics
from evaluation.clip.reranking import SCORED
from evaluation.denoising import CAPTION_LOSS
from evaluation.features.metrics import FEATURE_METRICS, reconstructs
from evaluation.points import POINT_METRICS, default_point_metrics
from evaluation.text_perplexity import TEXT_PERPLEXITY
from evaluation.written_captions import AGREEMENT, ROUND_TRIP, WRITTEN
from sample.samplers.diffusion import DiffusionSampler
from sample.samplers.llama import LlamaSampler
from sample.trained import TrainedSampler


def applicable_metrics(
    trained: TrainedSampler, split: str, settings: ClipSettings
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The metrics of a run that are computed unless a user names some, and those that are computed when named."""
    sampler = trained.sampler
    if "features" in sampler.makes:
        defaults = default_metrics(trained, split, settings)
        return defaults, tuple(name for name in CLIP_METRICS if name not in defaults)
    if "point" in sampler.makes:
        defaults = default_point_metrics(trained)
        return defaults, tuple(name for name in POINT_METRICS if name not in defaults)
    graded = find_world(trained.config.data.dataset) is not None
    if {"text", "image"} <= set(sampler.makes):  # either of the other, or both of nothing
        if graded:
            return ("caption_accuracy", WRITTEN, AGREEMENT, ROUND_TRIP), (CAPTION_SCORES, *SCORED)
        return (CAPTION_SCORES,), SCORED
    if "text" in sampler.makes and set(sampler.reads) == {"text", "image"}:
        asked = (ANSWER_PERPLEXITY, TEXT_PERPLEXITY) if trained.config.data.dialogues else ()
        return (ANSWERS, *asked) if graded else asked, ()
    if isinstance(sampler, LlamaSampler):
        return (TEXT_PERPLEXITY,) if trained.config.data.dialogues else (), ()
    if "text" in sampler.makes and hasattr(sampler, "captions"):
        return ((WRITTEN,), (CAPTION_SCORES,)) if graded else ((CAPTION_SCORES,), ())
    if "image" not in sampler.makes:
        return (), ()
    if reconstructs(sampler):
        return ("reconstruction",), FEATURE_METRICS
    if "image" in sampler.reads:  # no dataset says which picture and caption make which picture
        return (), ()
    captions = "text" in sampler.reads and trained.tokenizer is not None
    denoising = (CAPTION_LOSS,) if captions and isinstance(sampler, DiffusionSampler) else ()
    drawn = (*denoising, *SCORED) if captions else ()
    return ("caption_accuracy",) if captions else (), (*drawn, *FEATURE_METRICS)


def chosen_metrics(
    trained: TrainedSampler, metrics: Sequence[str], split: str, settings: ClipSettings
) -> tuple[str, ...]:
    """The metrics that were named, each once, or those that a run has without; see `applicable_metrics`.

    Raises:
      UserError: if one does not apply to the run, or there is none.
    """
    defaults, others = applicable_metrics(trained, split, settings)
    names, known = tuple(dict.fromkeys(metrics or defaults)), (*defaults, *others)
    kind = f"{trained.config.objective}{_told(trained)}"
    if not known:
        told, made = (" and ".join(rows) for rows in (trained.sampler.reads, trained.sampler.makes))
        raise UserError(f"no metric is of runs of {kind}, which make {made} of {told or 'nothing'}")
    for name in names:
        if name not in known:
            raise UserError(f"metric {name!r} does not apply to this run of {kind}; choose {', '.join(known)}")
    if not names:
        raise UserError(f"name what to compute with --metrics; this run of {kind} has {', '.join(known)}")
    return names


def _told(trained: TrainedSampler) -> str:
    """What a run that draws pictures without captions is told, for messages; "" for any other run."""
    reads, makes = trained.sampler.reads, trained.sampler.makes
    if "image" not in makes or {"text", "image"} & set(reads):
        return ""
    return " (told classes, no captions)" if "label" in reads else " (told nothing)"
