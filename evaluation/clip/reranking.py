"""What a CLIP makes of the pictures that a run draws: how near they are to their captions, and what choosing gains."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from PIL import Image

from cli.errors import UserError
from data.pictures import open_picture
from data.records import first_captions
from data.scenes.grader import SceneGrader
from evaluation.caption_accuracy import captioned_pictures, world_of
from evaluation.clip.score import CONVENTIONS, PREFIX, clip_score
from evaluation.records import Record, keep_picture
from sample.embedding import BLOCK, ClipEmbedder
from sample.sheets.grid import to_uint8
from sample.trained import TrainedSampler

SCORED = ("clip_score", "rerank")


@dataclasses.dataclass(frozen=True)
class ClipScorer:
    """The CLIP that scores pictures.

    Attributes:
      clip: its run, which embeds.
      convention: of the score, one of `evaluation.clip.score.CONVENTIONS`.
      candidates: most pictures that it chooses from.
    """

    clip: ClipEmbedder
    convention: str = "cosine"
    candidates: int = 16

    def __post_init__(self) -> None:
        """Raises UserError on an impossible value."""
        if self.convention not in CONVENTIONS:
            raise UserError(f"--convention={self.convention} is unknown; choose one of {', '.join(CONVENTIONS)}")
        if self.candidates < 1:
            raise UserError(f"--candidates must be at least 1, not {self.candidates}")


def scorer_record(
    name: str, trained: TrainedSampler, scorer: ClipScorer, split: str, num: int, seed: int, settings: Mapping[str, Any]
) -> Record:
    """Computes one metric of `SCORED`: its values and what they depend on beside the run and its sampling.

    Args:
      name: of the metric.
      trained: the run that draws.
      scorer: the rest.
      split: of the run's dataset.
      num: captions.
      seed: of drawing.
      settings: overrides of `config.sample`.

    Raises:
      UserError: if the split has fewer records, or a record has no caption.
    """
    run = scorer.clip.trained
    about = {"clip": str(run.run.folder), "clip_step": run.weights.step}
    if name == "rerank":
        return {**_rerank(trained, scorer.clip, split, num, scorer.candidates, seed, settings), **about}
    return {**_score(trained, scorer, split, num, seed, settings), **about}


def _score(
    trained: TrainedSampler, scorer: ClipScorer, split: str, num: int, seed: int, settings: Mapping[str, Any]
) -> Record:
    """CLIP score of the pictures of a split's first captions; of any dataset, as nothing is graded."""
    captions = first_captions(trained.config.data, split, num)
    rows, cosines = trained.encode(captions), np.empty(num)
    prefix = PREFIX if scorer.convention == "hessel" else ""
    for start in range(0, num, BLOCK):
        part = slice(start, min(start + BLOCK, num))
        text = {name: value[part] for name, value in rows.items()}
        images = to_uint8(trained(text, seed=seed, indices=range(part.start, part.stop), **settings)["image"])
        cosines[part] = scorer.clip.cosines(images, [prefix + caption for caption in captions[part]])
    return {"values": {"clip_score": clip_score(cosines, scorer.convention)}, "convention": scorer.convention}


def _rerank(
    trained: TrainedSampler,
    clip: ClipEmbedder,
    split: str,
    num: int,
    candidates: int,
    seed: int,
    settings: Mapping[str, Any],
) -> Record:
    """Draws candidates for captions of the embedded dataset, and grades the one chosen from 1, 2, 4, ... of them.

    Candidate j of caption i is picture j num + i of the seed, so that the first is the one of `caption_accuracy`.

    Returns:
      Shares `chosen_<k>`, of captions whose chosen picture has every attribute right; `any_<k>`, of those with such a
      picture among k, which no choice can exceed; and the standard errors of both, over captions.
    """
    captions = captioned_pictures(trained.config, split, num).captions
    grader, rows = SceneGrader(world_of(trained.config)), trained.encode(captions)
    right, cosines = np.empty((num, candidates), bool), np.empty((num, candidates))
    for j in range(candidates):
        outputs = trained(rows, seed=seed, indices=range(j * num, (j + 1) * num), **settings)
        images = to_uint8(outputs["image"])
        right[:, j] = [score["all"] for score in grader.grade(captions, images)]
        cosines[:, j] = clip.cosines(images, captions)
    values, errors = {}, {}
    counts = powers_of_two(candidates)
    for k in counts:
        chosen, possible = chosen_from(right, cosines, k)
        for name, shares in ((f"chosen_{k}", chosen), (f"any_{k}", possible)):
            values[name] = float(shares.mean())
            errors[name] = float(shares.std(ddof=1) / np.sqrt(num)) if num > 1 else 0.0
    keep_picture(trained, f"rerank_{split}", draw_curve(counts, values, errors, f"{split}, {num} captions"))
    return {
        "values": values,
        "counted": dict.fromkeys(values, num),
        "standard_errors": errors,
        "candidates": candidates,
    }


def chosen_from(
    right: Bool[np.ndarray, "n c"], cosines: Float[np.ndarray, "n c"], k: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """How often the nearest of k candidates is right, and any of them: means over all c / k groups of a caption."""
    groups = right.shape[1] // k
    cosines = np.where(np.isnan(cosines), -np.inf, cosines)  # no number is nearer than none
    right, cosines = (x[:, : groups * k].reshape(len(x), groups, k) for x in (right, cosines))
    chosen = np.take_along_axis(right, np.argmax(cosines, axis=2)[..., None], axis=2)[..., 0]
    return chosen.mean(axis=1), right.any(axis=2).mean(axis=1)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to a limit."""
    return [2**power for power in range(limit.bit_length())]


def draw_curve(
    counts: Sequence[int], values: Mapping[str, float], errors: Mapping[str, float], title: str
) -> Image.Image:
    """Plots accuracy against candidates, with bars of two standard errors."""
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(5, 3.5), dpi=120, layout="constrained")
        axes = figure.subplots()
        chosen = [100 * values[f"chosen_{k}"] for k in counts]
        bars = [200 * errors[f"chosen_{k}"] for k in counts]
        axes.errorbar(counts, chosen, yerr=bars, marker="o", capsize=3, label="CLIP's choice")
        axes.plot(counts, [100 * values[f"any_{k}"] for k in counts], "--", color="gray", label="any of them")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(k) for k in counts])
        axes.set_xlabel("candidates")
        axes.set_ylabel("every attribute right, %")
        axes.set_title(title)
        axes.legend()
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return open_picture(stream.getvalue())
