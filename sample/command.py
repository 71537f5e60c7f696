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
from sample.conditions import Order, draw_images, order_rows, records_of
from sample.embedding import ClipEmbedder
from sample.sheets.grid import draw_grid, to_uint8
from sample.sheets.points import draw_point_run
from sample.trained import TrainedSampler


@dataclasses.dataclass(frozen=True)
class Samples:
    """Pictures with what they came from.

    Attributes:
      images: one picture a record.
      records: prompt (or label, or file), seed and index of each.
      settings: run, step, seed and sampler settings of all of them.
    """

    images: UInt8[np.ndarray, "n h w c"]
    records: list[dict[str, Any]]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Drawn(Samples):
    """Pictures with a labelled grid.

    Attributes:
      picture: the grid.
    """

    picture: Image.Image


def draw_pictures(
    trained: TrainedSampler, order: Order, num: int, clip: ClipEmbedder | None = None, keep: int = 0
) -> Drawn:
    """Draws `num` pictures of each condition, a row of the grid each (several rows beyond eight).

    Args:
      trained: the run that draws.
      order: what.
      num: pictures drawn of each condition.
      clip: chooses among the pictures of a prompt, if there is one (Ramesh et al. 2021, section 2.6).
      keep: how many it keeps of each prompt, best first; 0 for all.

    Raises:
      UserError: if the run does not read such conditions, a prompt is empty or a setting is impossible.
    """
    rows, count = order_rows(trained, order), len(order.conditions)
    if clip is not None and order.conditions[0].prompt is None:
        raise UserError(f"{trained.run.folder} draws no captions, and --rerank compares with these; leave it out")
    images, records = draw_images(trained, order, rows, num), records_of(order, num)
    labels = [str(condition) for condition in order.conditions for _ in range(num)]
    description, shown = order.describe(trained), num
    if clip is not None:
        shown = keep or num
        cosines = clip.cosines(images, labels).reshape(count, num)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :shown]  # of equals, the one drawn first
        kept = (best + num * np.arange(count)[:, None]).ravel()
        images = images[kept]
        records = [{**records[place], "clip_cosine": float(cosines.ravel()[place])} for place in kept]
        labels = [f"{labels[place]} [{cosines.ravel()[place]:.3f}]" for place in kept]
        description |= {
            "rerank": str(clip.trained.run.folder),
            "rerank_step": clip.trained.weights.step,
            "candidates": num,
        }
    columns = min(shown, 8) if shown > 1 else min(count, 8)
    grid = draw_grid(images, columns=columns, labels=labels if any(labels) else None)
    return Drawn(images, records, description, grid)


def reconstruct(trained: TrainedSampler, files: Sequence[str]) -> Drawn:
    """Encodes and decodes pictures; the grid shows each beside its reconstruction.

    Raises:
      UserError: if the run does not reconstruct, or a file is not a picture.
    """
    if "image" not in trained.sampler.reads:
        what = "captions" if "text" in trained.sampler.reads else "pictures"
        raise UserError(f"{trained.run.folder} draws {what} and reconstructs nothing; leave out --image")
    data = trained.config.data
    transform = transform_pair(data.transform).evaluation
    images = np.stack([read_picture(name, data.image_size, transform) for name in files])
    outputs = trained({"image": images}, seed=0, indices=range(len(files)))
    results = to_uint8(outputs["image"])
    pairs = np.stack([images, results], axis=1).reshape(-1, *images.shape[1:])
    labels = [label for name in files for label in (Path(name).name, "reconstruction")]
    records = [{"image": name, "index": index} for index, name in enumerate(files)]
    return Drawn(results, records, trained.describe(0, {}), draw_grid(pairs, columns=2, labels=labels))


def draw_figure(trained: TrainedSampler, num: int, seed: int, settings: Mapping[str, Any]) -> Drawn:
    """One picture of what a diffusion of points does; see `sample.sheets.points.draw_point_run`."""
    figure = draw_point_run(trained, num, seed, settings)
    return Drawn(np.asarray(figure)[None], [{"points": num}], trained.describe(seed, settings), figure)


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


def prepare_out(out: Path) -> None:
    """Makes the folder of a picture file, before work is done that could be lost.

    Raises:
      UserError: if it cannot be made, or the name is not one of a picture.
    """
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise UserError(f"cannot write {out}: {out.suffix or 'no extension'} is no kind of picture; give --out a .png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; give --out a .png path that can be written") from error


def write_picture(out: Path, picture: Image.Image) -> None:
    """Writes one picture.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        picture.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}; give --out a .png path that can be written") from error


def write_files(folder: Path, samples: Samples) -> None:
    """Writes each picture, and `samples.json` with prompts, seeds and settings.

    Raises:
      UserError: if the folder cannot be written.
    """
    records = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (image, record) in enumerate(zip(samples.images, samples.records, strict=True)):
            name = f"{number:05d}.png"
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / name)
            records.append({"file": name, **record})
        text = json.dumps({"settings": samples.settings, "samples": records}, indent=2)
        (folder / "samples.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; give --files a folder that can be written") from error
