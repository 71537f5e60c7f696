"""What `python -m evaluation` computes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.plurals import spell_count
from data.points import is_points
from data.records import dataset_folder, first_captions, first_classes, open_records
from data.scenes import find_world
from evaluation.answer_perplexity import ANSWER_PERPLEXITY, answer_perplexity
from evaluation.answers import ANSWERS, answer_values
from evaluation.applicable_metrics import chosen_metrics
from evaluation.caption_accuracy import caption_accuracy, captioned_pictures
from evaluation.caption_scores import CAPTION_SCORES, caption_score_values
from evaluation.clip.metrics import SHOWN, clip_makers
from evaluation.clip.reranking import SCORED, ClipScorer, scorer_record
from evaluation.denoising import CAPTION_LOSS, caption_loss
from evaluation.features.metrics import FEATURE_METRICS, FeatureSettings, check_feature_metrics, feature_makers
from evaluation.points import LIKELIHOOD, POINT_METRICS, point_values
from evaluation.reconstruction import code_usage, reconstruction_errors
from evaluation.records import Record, check_finite, heading, keep_picture
from evaluation.text_perplexity import TEXT_PERPLEXITY, text_perplexity
from evaluation.tools import Tools, check_tools
from evaluation.written_captions import (
    AGREEMENT,
    ROUND_TRIP,
    WRITTEN,
    agreement_values,
    round_trip_values,
    written_values,
)
from sample.samplers.unidiffuser_modes import choose_modes
from sample.sheets.grid import draw_grid, to_uint8
from sample.trained import TrainedSampler, refuse_idle

# Metrics of runs that draw captions, describe pictures and draw pairs: the rows that each of their calls is told.
_TOLD: Mapping[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("caption_accuracy", *SCORED), (("text",),)),
    **{WRITTEN: (("image",),), CAPTION_SCORES: (("image",),)},
    **{AGREEMENT: ((),), ROUND_TRIP: (("text",), ("image",))},
}
# Those that draw nothing, and so read no setting of it.
_DRAW_NOTHING = (CAPTION_LOSS, ANSWER_PERPLEXITY, TEXT_PERPLEXITY, LIKELIHOOD)
# Those that read no split: computed once, and recorded with none.
_OF_NO_SPLIT = (AGREEMENT,)


def default_splits(config: ConfigDict) -> list[str]:
    """What is evaluated unless a user names splits: the validation split, and what the embedded dataset holds out."""
    return [config.data.validation_split, *(["held_out"] if find_world(config.data.dataset) else [])]


def on_dataset(
    trained: TrainedSampler, dataset: str, data_dir: str, image_field: str = "", text_field: str = ""
) -> TrainedSampler:
    """The run, evaluated on another dataset than its own.

    Args:
      trained: the run, or a converted CLIP, which has none of its own.
      dataset: its name; "" for the run's.
      data_dir: where it is; "" for where the run's is.
      image_field: its field of pictures; "" for the run's, and of another dataset for a usual name.
      text_field: its field of captions; "" likewise.

    Raises:
      UserError: if there is no dataset, or it has points where the run draws pictures (or the other way round), or the
        run draws classes, whose numbers mean others elsewhere.
    """
    own, config = trained.config.data, trained.config.copy_and_resolve_references()
    config.data.dataset, config.data.data_dir = dataset or own.dataset, data_dir or own.data_dir
    for name, given in (("image_field", image_field), ("text_field", text_field)):
        config.data[name] = given or (own[name] if config.data.dataset == own.dataset else "")
    if not config.data.dataset:
        raise UserError(f"{trained.run.folder} was converted, and knows no dataset; give --dataset, and --splits of it")
    if is_points(config.data.dataset) != ("point" in trained.sampler.makes):
        raise UserError(f"{trained.run.folder} is of {own.dataset}; --dataset={dataset} holds something else")
    if "label" in trained.sampler.reads and config.data.dataset != own.dataset:
        raise UserError(f"{trained.run.folder} draws the classes of {own.dataset}; leave --dataset out")
    return dataclasses.replace(trained, config=config)


def check_mode(trained: TrainedSampler, names: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of metrics without a mode, which follows from what each of them tells the run.

    Args:
      trained: the run.
      names: the metrics.
      settings: overrides of `config.sample`.

    Raises:
      UserError: if they hold a mode, and a metric asks for another.
    """
    mode = settings.get("mode")
    for name in names if mode else ():
        for told in _TOLD.get(name, ()):
            (asked,) = choose_modes("", told)
            if mode != asked:
                raise UserError(f"{name} asks the run for mode {asked}, and --mode={mode} is given; leave it out")
    return {**{name: value for name, value in settings.items() if name != "mode"}, **trained.inferred}


def drawn_metrics(names: Sequence[str]) -> list[str]:
    """Those of some metrics that draw."""
    return [name for name in names if name not in _DRAW_NOTHING]


def idle_in(trained: TrainedSampler, names: Sequence[str], cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Settings that have no effect on any of some metrics in any of some cells, each with the reason.

    Args:
      trained: the run.
      names: the metrics.
      cells: overrides of `config.sample`, without a mode.

    Raises:
      UserError: if a setting is impossible.
    """
    drawn = drawn_metrics(names)
    if not drawn:
        return dict.fromkeys(trained.config.sample, f"{' and '.join(names)} draw{'s' * (len(names) == 1)} nothing")
    return trained.idle(*((told, cell) for cell in cells for name in drawn for told in _TOLD.get(name, ((),))))


def evaluate_run(
    trained: TrainedSampler,
    metrics: Sequence[str],
    splits: Sequence[str],
    num: int,
    seed: int,
    settings: Mapping[str, Any],
    tools: Tools | None = None,
    keep: Callable[[Record], None] = lambda _: None,
    checked: bool = False,
) -> list[Record]:
    """Computes metrics of a run on each split. A mistake in one of them costs no other.

    Args:
      trained: the run.
      metrics: names, or none for all that apply to its objective and need no features.
      splits: of its dataset.
      num: pictures of each split.
      seed: of sampling.
      settings: overrides of `config.sample`.
      tools: what some metrics take beside the run; None for none.
      keep: is given each record as soon as there is one.
      checked: whether the caller has looked at the settings, as of a sweep, where each has an effect in some cell.

    Returns:
      One record for each metric and split (None of a metric that reads none), with values and everything they depend
      on.

    Raises:
      UserError: if a metric is unknown or does not apply, or lacks what it needs, or a setting is not the run's, before
        any is computed; or after all were tried, if some of them failed, such as one over values that are not finite.
    """
    sampler, tools = trained.sampler, tools or Tools()
    names = chosen_metrics(trained, metrics, splits[0], tools.clip)
    if not checked:
        check_tools(trained, names, drawn_metrics(names), tools)
    compared = [name for name in names if name in FEATURE_METRICS]
    check_feature_metrics(compared, num, tools.features)
    if not checked:
        trained.check_settings(settings, besides=False)
    settings = check_mode(trained, names, settings)
    if not checked:
        refuse_idle(idle_in(trained, names, [settings]), settings)
    for split in () if "point" in sampler.makes else splits:
        _check_records(trained, names, split, num)
    records, failed = [], []

    def attempt(tried: Sequence[str], split: str | None, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except UserError as error:
            failed.append(f"{heading(' and '.join(tried), split)}: {error}")
            return None

    def add(name: str, split: str | None, make: Callable[[], Record]) -> None:
        found = attempt([name], split, lambda: check_finite(make()))
        if found is not None:
            records.append({"metric": name, "split": split, **_provenance(trained, name, num, seed, settings), **found})
            keep(records[-1])

    for split in splits:
        # Pictures are embedded once, and drawn once, for all metrics that compare them.
        shared = names if "features" in sampler.makes else compared
        for name in names if shared is not names else ():
            splitless = name in _OF_NO_SPLIT
            if name not in compared and not (splitless and split != splits[0]):
                asked = _Asked(trained, split, num, seed, settings, tools)
                add(name, None if splitless else split, functools.partial(_FOUND[name], asked))
        if not shared:
            continue
        if shared is names:
            open_shared = functools.partial(clip_makers, trained, split, num, tools.clip)
        else:
            chosen = cast(FeatureSettings, tools.features)  # checked above
            open_shared = functools.partial(feature_makers, trained, shared, split, num, seed, settings, chosen)
        for name, make in (attempt(shared, split, open_shared) or {}).items():
            if name in shared:
                add(name, split, make)
    if failed:
        rest = f"; {spell_count(len(records), 'other is', 'others are')} kept" if records else ""
        raise UserError("; ".join(failed) + rest)
    return records


def _check_records(trained: TrainedSampler, names: Sequence[str], split: str, num: int) -> None:
    """Finds mistakes in a split before work that they would cost: each record has what the metrics need of it."""
    data, sampler = trained.config.data, trained.sampler
    open_records(data, split).require(num)
    if "features" in sampler.makes:
        captioned = num if "retrieval" in names else min(num, SHOWN) if "similarity" in names else 0
    else:
        captioned = num if "text" in sampler.reads and set(names) != {"reconstruction"} else 0
        if "label" in sampler.reads:
            first_classes(data, split, num)
    if captioned:
        first_captions(data, split, captioned)


def _caption_accuracy(trained: TrainedSampler, split: str, num: int, seed: int, settings: Mapping[str, Any]) -> Record:
    """Grades drawn captions; saves the first of them as a picture, the wrong ones marked."""
    pictures = captioned_pictures(trained.config, split, num)

    def draw(captions: Sequence[str]) -> UInt8[np.ndarray, "n h w 3"]:
        outputs = trained(trained.encode(captions), seed=seed, indices=range(len(captions)), **settings)
        return to_uint8(outputs["image"])

    accuracy = caption_accuracy(trained.config, pictures.captions, draw)
    images, scores = accuracy.images, accuracy.scores
    shown = min(32, len(images))
    wrong = [[name for name, right in score.items() if not right and name != "all"] for score in scores[:shown]]
    labels = [
        f"{caption} [{', '.join(names)}]" if names else caption
        for caption, names in zip(pictures.captions, wrong, strict=False)
    ]
    grid = draw_grid(images[:shown], columns=8, labels=labels, marks=[not names for names in wrong])
    stem = "_".join(["evaluation", split, *_spell(trained, seed, settings)])
    keep_picture(trained, stem, grid)
    return {"values": accuracy.shares, "counted": accuracy.counted}


def _reconstruction(trained: TrainedSampler, split: str, num: int) -> Record:
    """Passes pictures through the tokenizer and grades what is left of them."""
    pictures = captioned_pictures(trained.config, split, num)
    tokens = []

    def draw(captions: Sequence[str]) -> UInt8[np.ndarray, "n h w 3"]:
        outputs = trained({"image": pictures.images}, seed=0, indices=range(len(captions)))
        if "tokens" in outputs:
            tokens.append(outputs["tokens"])
        return to_uint8(outputs["image"])

    accuracy = caption_accuracy(trained.config, pictures.captions, draw)
    values = {
        **reconstruction_errors(pictures.images, accuracy.images),
        **(code_usage(tokens[0], trained.sampler.model.vocab_size) if tokens else {}),
        **{f"scene_{name}": share for name, share in accuracy.shares.items()},
    }
    return {"values": values, "counted": {f"scene_{name}": n for name, n in accuracy.counted.items()}}


def _spell(trained: TrainedSampler, seed: int, settings: Mapping[str, Any]) -> list[str]:
    """What a picture's name says of a cell: weights and seed where they are not the usual ones, and all settings."""
    weights, told = trained.weights, {name: value for name, value in settings.items() if name != "mode"}
    if weights.step != trained.run.latest_step():
        told["step"] = weights.step
    if weights.ema is not True and (weights.ema or trained.run.config.ema.decay):
        told["ema"] = float(weights.ema)
    if seed:
        told["seed"] = seed
    return [f"{key}_{value}" for key, value in told.items()]


def _provenance(trained: TrainedSampler, name: str, num: int, seed: int, settings: Mapping[str, Any]) -> Record:
    """What a metric is computed with: settings that it has no use for, and a mode, which it chooses, are none of it."""
    data, drawing = trained.config.data, {}
    if trained.config.sample:
        idle = {"mode", *idle_in(trained, [name], [settings])}
        chosen = {**trained.config.sample, **settings}
        guide = {} if name in _DRAW_NOTHING else trained.guide
        drawing = {"seed": seed, **{key: value for key, value in chosen.items() if key not in idle}, **guide}
    return {
        "num": num,
        **trained.weights.record,
        "dataset": data.dataset
        if "point" in trained.sampler.makes
        else f"{data.dataset}/{dataset_folder(data.dataset, data.data_dir).name}",
        **drawing,
    }


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a metric is computed from on one split; see `evaluate_run`."""

    trained: TrainedSampler
    split: str
    num: int
    seed: int
    settings: Mapping[str, Any]
    tools: Tools

    @property
    def records(self) -> tuple[TrainedSampler, str, int]:
        """What a metric takes that draws nothing."""
        return self.trained, self.split, self.num

    @property
    def drawn(self) -> tuple[TrainedSampler, str, int, int, Mapping[str, Any]]:
        """What one takes that draws."""
        return *self.records, self.seed, self.settings


# What each metric finds that shares nothing with others.
_FOUND: Mapping[str, Callable[[_Asked], Record]] = {
    "caption_accuracy": lambda asked: _caption_accuracy(*asked.drawn),
    "reconstruction": lambda asked: _reconstruction(*asked.records),
    CAPTION_LOSS: lambda asked: caption_loss(*asked.records, asked.seed),
    CAPTION_SCORES: lambda asked: caption_score_values(*asked.drawn, asked.tools.scorer),
    WRITTEN: lambda asked: written_values(*asked.drawn),
    AGREEMENT: lambda asked: agreement_values(asked.trained, asked.num, asked.seed, asked.settings),
    ROUND_TRIP: lambda asked: round_trip_values(*asked.drawn),
    ANSWERS: lambda asked: answer_values(*asked.drawn),
    ANSWER_PERPLEXITY: lambda asked: answer_perplexity(*asked.records),
    TEXT_PERPLEXITY: lambda asked: text_perplexity(*asked.records),
    **{
        name: lambda asked, name=name: scorer_record(
            name,
            asked.trained,
            cast(ClipScorer, asked.tools.scorer),
            asked.split,
            asked.num,
            asked.seed,
            asked.settings,
        )
        for name in SCORED
    },
    **{name: lambda asked, name=name: point_values(name, *asked.drawn) for name in POINT_METRICS},
}
