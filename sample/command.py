"""What `python -m sample` draws and writes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cli.errors import UserError
from data.preprocess import PictureTransform, center_square, transform_pair
from sample.embedding import ClipEmbedder
from sample.grid import draw_grid, to_uint8
from sample.points import draw_point_run
from sample.trained import TrainedSampler


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures with what they came from.

    Attributes:
      images: one picture a record.
      records: prompt (or file), seed and index of each.
      settings: run, step, seed and sampler settings of all of them.
      picture: the labelled grid.
    """

    images: UInt8[np.ndarray, "n h w c"]
    records: list[dict[str, Any]]
    settings: dict[str, Any]
    picture: Image.Image


def draw_prompts(
    trained: TrainedSampler,
    prompts: Sequence[str],
    num: int,
    seed: int,
    settings: Mapping[str, Any],
    clip: ClipEmbedder | None = None,
    keep: int = 0,
) -> Drawn:
    """Draws `num` pictures of each prompt, a row of the grid each (several rows beyond eight).

    Args:
      trained: the run that draws.
      prompts: captions.
      num: pictures drawn for each.
      seed: s; picture i of a prompt is drawn with `fold_in(key(s), i)`.
      settings: overrides of `config.sample`.
      clip: chooses among the pictures of a prompt, if there is one (Ramesh et al. 2021, section 2.6).
      keep: how many it keeps of each prompt, best first; 0 for all.

    Raises:
      UserError: if the run takes no captions, a prompt is empty or a setting is impossible.
    """
    captions = [prompt for prompt in prompts for _ in range(num)]
    indices = list(range(num)) * len(prompts)
    outputs = trained(trained.encode(captions), seed=seed, indices=indices, **settings)
    images = to_uint8(outputs["image"])
    records: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": seed, "index": index} for prompt, index in zip(captions, indices, strict=True)
    ]
    description, shown = _describe(trained, seed, settings), num
    if clip is not None:
        shown = keep or num
        cosines = clip.cosines(images, captions).reshape(len(prompts), num)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :shown]  # of equals, the one drawn first
        kept = (best + num * np.arange(len(prompts))[:, None]).ravel()
        images = images[kept]
        records = [{**records[place], "clip_cosine": float(cosines.ravel()[place])} for place in kept]
        description |= {
            "rerank": str(clip.trained.run.folder),
            "rerank_step": clip.trained.weights.step,
            "candidates": num,
        }
    columns = min(shown, 8) if shown > 1 else min(len(prompts), 8)
    labels = [record["prompt"] for record in records]
    if clip is not None:
        labels = [f"{record['prompt']} [{record['clip_cosine']:.3f}]" for record in records]
    return Drawn(images, records, description, draw_grid(images, columns=columns, labels=labels))


def reconstruct(trained: TrainedSampler, files: Sequence[str]) -> Drawn:
    """Encodes and decodes pictures; the grid shows each beside its reconstruction.

    Raises:
      UserError: if the run does not reconstruct, or a file is not a picture.
    """
    if trained.tokenizer is not None:
        raise UserError(f"{trained.run.folder} draws captions and reconstructs nothing; give --prompt=TEXT")
    data = trained.config.data
    transform = transform_pair(data.transform).evaluation
    images = np.stack([read_picture(name, data.image_size, transform) for name in files])
    outputs = trained({"image": images}, seed=0, indices=range(len(files)))
    results = to_uint8(outputs["image"])
    pairs = np.stack([images, results], axis=1).reshape(-1, *images.shape[1:])
    labels = [label for name in files for label in (Path(name).name, "reconstruction")]
    records = [{"image": name, "index": index} for index, name in enumerate(files)]
    return Drawn(results, records, _describe(trained, 0, {}), draw_grid(pairs, columns=2, labels=labels))


def draw_figure(trained: TrainedSampler, num: int, seed: int, settings: Mapping[str, Any]) -> Drawn:
    """One picture of what a diffusion of points does; see `sample.points.draw_point_run`."""
    figure = draw_point_run(trained, num, seed, settings)
    return Drawn(np.asarray(figure)[None], [{"points": num}], _describe(trained, seed, settings), figure)


def read_picture(
    name: str, size: int, transform: PictureTransform = center_square
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Reads a picture file as RGB, and makes it a square as evaluation does.

    Args:
      name: of the file.
      size: of the square, in pixels.
      transform: one that draws nothing.

    Raises:
      UserError: if it is missing or not a picture.
    """
    try:
        with Image.open(name) as picture:
            array = np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise UserError(f"cannot read the picture {name}: {error}") from error
    return transform(array, size, None)


def write_files(folder: Path, drawn: Drawn) -> None:
    """Writes each picture, and `samples.json` with prompts, seeds and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (image, record) in enumerate(zip(drawn.images, drawn.records, strict=True)):
        name = f"{number:05d}.png"
        Image.fromarray(image).save(folder / name)
        records.append({"file": name, **record})
    text = json.dumps({"settings": drawn.settings, "samples": records}, indent=2)
    (folder / "samples.json").write_text(text + "\n", encoding="utf-8")


def _describe(trained: TrainedSampler, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": str(trained.run.folder),
        "step": trained.weights.step,
        "ema": trained.weights.ema,
        "seed": seed,
        **trained.config.sample.to_dict(),
        **settings,
    }
