"""What `python -m sample` reads and writes: pictures, and samples with what they came from."""

import dataclasses
import io
import json
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cli.errors import UserError
from cli.locations import Location, explain, make_folder, write_whole
from cli.plurals import spell_count
from data.pictures import open_picture


@dataclasses.dataclass(frozen=True)
class Samples:
    """What was made, with what it came from.

    Attributes:
      images: one picture a record, None for one without; None of a run that makes no pictures.
      texts: one text a record, None for one without; None of a run that makes no text.
      records: prompt, label or picture file, seed and index of each.
      settings: run, step, seed and sampler settings of all of them.
    """

    images: UInt8[np.ndarray, "n h w c"] | list[UInt8[np.ndarray, "h w c"] | None] | None
    texts: tuple[str | None, ...] | None
    records: list[dict[str, Any]]
    settings: dict[str, Any]

    def __str__(self) -> str:
        """How many of what."""
        made = {"picture": self.images, "text": self.texts}
        first, *others = [name for name, value in made.items() if value is not None]
        number = len(self.records)
        return " with ".join([spell_count(number, first), *(one if number == 1 else f"{one}s" for one in others)])


def read_mask(name: str, picture: UInt8[np.ndarray, "h w 3"], picture_name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Reads the mask of a picture, at the picture's size.

    Args:
      name: of the file.
      picture: that it was painted on, before anything is cut off.
      picture_name: of that one's file.

    Raises:
      UserError: if it is missing, not a picture, or of another aspect ratio.
    """
    mask = open_picture(name)
    height, width = picture.shape[:2]
    # One that was resized from the picture, or this from it, may have a side that was rounded, by less than a pixel.
    if abs(mask.width * height - mask.height * width) >= max(mask.width, mask.height, width, height):
        raise UserError(
            f"the mask {name} has {mask.height} x {mask.width} pixels, and the picture {picture_name} {height} x "
            f"{width}; a mask lies on its picture: give one of the same height and width, or of the same ratio of them"
        )
    if mask.size == (width, height):
        return np.asarray(mask)
    return np.asarray(mask.resize((width, height), Image.Resampling.BOX))


def prepare_out(out: Location) -> None:
    """Makes the folder of a picture file, before work is done that could be lost.

    Raises:
      UserError: if it cannot be made, or the name is not one of a picture.
    """
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise UserError(f"cannot write {out}: {out.suffix or 'no extension'} is no kind of picture; give --out a .png")
    try:
        make_folder(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; give --out a .png path that can be written") from error


def write_picture(out: Location, picture: Image.Image) -> None:
    """Writes one picture, whole or not at all.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        write_whole(out, _encoded(picture, out.suffix))
    except (OSError, ValueError) as error:
        advice = f"cannot write {out}: {error}; give --out a .png path that can be written"
        raise explain(error) or UserError(advice) from error


def write_files(folder: Location, samples: Samples) -> None:
    """Writes each picture as "00000.png", each text as "00000.txt", and `samples.json`: texts, conditions, settings.

    Raises:
      UserError: if the folder cannot be written.
    """
    records = []
    try:
        make_folder(folder)
        for number, record in enumerate(samples.records):
            written = {}
            image = None if samples.images is None else samples.images[number]
            if image is not None:
                written["file"] = f"{number:05d}.png"
                picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
                write_whole(folder / written["file"], _encoded(picture, ".png"))
            text = None if samples.texts is None else samples.texts[number]
            if text is not None:
                written["text_file"], written["text"] = f"{number:05d}.txt", text
                write_whole(folder / written["text_file"], text + "\n")
            records.append({**written, **record})
        text = json.dumps({"settings": samples.settings, "samples": records}, indent=2, ensure_ascii=False)
        write_whole(folder / "samples.json", text + "\n")
    except OSError as error:
        advice = f"cannot write {folder}: {error}; give --files a folder that can be written"
        raise explain(error) or UserError(advice) from error


def _encoded(picture: Image.Image, suffix: str) -> bytes:
    """A picture as the bytes of a file that is named so."""
    content = io.BytesIO()
    picture.save(content, format=Image.registered_extensions()[suffix.lower()])
    return content.getvalue()
