"""What `python -m evaluation` computes, prints and writes."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cli.errors import UserError
from data.pipeline import dataset_folder
from evaluation.caption_accuracy import CaptionedPictures, caption_accuracy, captioned_pictures
from evaluation.reconstruction import code_usage, reconstruction_errors
from sample.grid import draw_grid, to_uint8
from sample.trained import TrainedSampler
from weights.run import EVALUATION, SAMPLES, Run

Record = dict[str, Any]

METRICS: Mapping[str, tuple[str, ...]] = {
    "dalle": ("caption_accuracy",),
    "dvae": ("reconstruction",),
    "vqvae": ("reconstruction",),
}


def evaluate_run(
    trained: TrainedSampler,
    metrics: Sequence[str],
    splits: Sequence[str],
    num: int,
    seed: int,
    settings: Mapping[str, Any],
) -> list[Record]:
    """Computes metrics of a run on each split.

    Args:
      trained: the run.
      metrics: names, or none for all that apply to its objective.
      splits: of its dataset.
      num: pictures of each split.
      seed: of sampling.
      settings: overrides of `config.sample`.

    Returns:
      One record for each metric and split, with values and everything they depend on.

    Raises:
      UserError: if a metric is unknown or does not apply.
    """
    known = METRICS[trained.config.objective]
    for name in metrics:
        if name not in known:
            raise UserError(f"metric {name!r} does not apply to {trained.config.objective}; choose {', '.join(known)}")
    records = []
    for name in metrics or known:
        for split in splits:
            pictures = captioned_pictures(trained.config, split, num)
            if name == "caption_accuracy":
                values = _caption_accuracy(trained, pictures, split, seed, settings)
            else:
                values = _reconstruction(trained, pictures)
            records.append({"metric": name, "split": split, **_provenance(trained, num, seed, settings), **values})
    return records


def write_records(run: Run, records: Sequence[Record]) -> None:
    """Adds records to `evaluation.json`; one with the same metric, split and settings is replaced."""
    path = run.folder / EVALUATION
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def identity(record: Record) -> str:
        return json.dumps({key: value for key, value in record.items() if key != "values"}, sort_keys=True)

    new = {identity(record) for record in records}
    kept = [record for record in earlier if identity(record) not in new]
    path.write_text(json.dumps([*kept, *records], indent=2) + "\n", encoding="utf-8")


def format_table(records: Sequence[Record]) -> str:
    """Lays records out for a terminal, shares with their standard error."""
    lines = []
    for record in records:
        settings = {k: v for k, v in record.items() if k not in ("metric", "split", "values")}
        lines.append(f"{record['metric']} on {record['split']} ({json.dumps(settings)})")
        for name, value in record["values"].items():
            if isinstance(value, float) and not name.endswith(("mse", "psnr_db", "perplexity")):
                error = math.sqrt(max(value * (1 - value), 0) / record["num"])
                lines.append(f"  {name:<28} {100 * value:6.1f} %  +- {100 * error:.1f}")
            else:
                lines.append(f"  {name:<28} {value:10.5g}")
    return "\n".join(lines)


def _caption_accuracy(
    trained: TrainedSampler, pictures: CaptionedPictures, split: str, seed: int, settings: Mapping[str, Any]
) -> Record:
    """Grades drawn captions; saves the first of them as a picture, the wrong ones marked."""

    def draw(captions: Sequence[str]) -> UInt8[np.ndarray, "n h w 3"]:
        outputs = trained(trained.encode(captions), seed=seed, indices=range(len(captions)), **settings)
        return to_uint8(outputs["image"])

    shares, images, scores = caption_accuracy(trained.config, pictures.captions, draw)
    shown = min(32, len(images))
    wrong = [[name for name, right in score.items() if not right and name != "all"] for score in scores[:shown]]
    labels = [
        f"{caption} [{', '.join(names)}]" if names else caption
        for caption, names in zip(pictures.captions, wrong, strict=False)
    ]
    grid = draw_grid(images[:shown], columns=8, labels=labels, marks=[not names for names in wrong])
    folder = trained.run.folder / SAMPLES
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"evaluation_{split}.png")
    return {"values": shares}


def _reconstruction(trained: TrainedSampler, pictures: CaptionedPictures) -> Record:
    """Passes pictures through the tokenizer and grades what is left of them."""
    tokens = []

    def draw(captions: Sequence[str]) -> UInt8[np.ndarray, "n h w 3"]:
        outputs = trained({"image": pictures.images}, seed=0, indices=range(len(captions)))
        tokens.append(outputs["tokens"])
        return to_uint8(outputs["image"])

    shares, images, _ = caption_accuracy(trained.config, pictures.captions, draw)
    values = {
        **reconstruction_errors(pictures.images, images),
        **code_usage(tokens[0], trained.config.models.dvae.vocab_size),
        **{f"scene_{name}": share for name, share in shares.items()},
    }
    return {"values": values}


def _provenance(trained: TrainedSampler, num: int, seed: int, settings: Mapping[str, Any]) -> Record:
    data = trained.config.data
    return {
        "num": num,
        "seed": seed,
        "step": trained.weights.step,
        "ema": trained.weights.ema,
        "dataset": f"{data.dataset}/{dataset_folder(data.dataset, data.data_dir).name}",
        **trained.config.sample.to_dict(),
        **settings,
    }
