"""The TFDS builder of `drawings/emoji32` and `drawings/emoji64`. Needs no TensorFlow, and downloads nothing.

Each drawing of OpenMoji is placed several times: larger or smaller, off the center, on backgrounds that captions name.
An example is a function of (version, config, split, drawing, variant) alone.
"""

import dataclasses
import io
import itertools
import zlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data.drawings.openmoji import Drawing, drawings, render

BACKGROUNDS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "white": (255, 255, 255),
        "gray": (176, 176, 176),
        "yellow": (255, 236, 140),
        "pink": (255, 190, 205),
        "green": (165, 225, 165),
        "blue": (150, 195, 250),
    }
)
SCALES = (0.7, 1.0)  # of a drawing to its picture

# Split -> pictures of each of its drawings.
VARIANTS: Mapping[str, int] = MappingProxyType({"train": 12, "validation": 1, "held_out": 4})
_HELD_OUT = 10  # one family in so many


@dataclasses.dataclass(eq=False, kw_only=True)
class DrawingsConfig(tfds.core.BuilderConfig):
    """How large pictures are.

    Attributes:
      image_size: height and width in pixels.
    """

    image_size: int


class Builder(tfds.core.GeneratorBasedBuilder):
    """Drawings with names.

    Splits: `train`; `validation`, the same drawings placed otherwise; `held_out`, drawings of things that training
    never shows, with all that differ from them in who is shown.
    """

    SPLITS = tuple(VARIANTS)
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [
        DrawingsConfig(name=f"emoji{size}", description=f"Drawings of {size} x {size} pixels.", image_size=size)
        for size in (32, 64)
    ]

    def __init__(self, *, sizes: Mapping[str, int] | None = None, **kwargs: Any):
        """Makes a builder.

        Args:
          sizes: split name -> number of examples, the first ones, where it is not all of them.
          **kwargs: those of every TFDS builder: config, data_dir, version, file_format.
        """
        super().__init__(**kwargs)
        self._sizes = dict(sizes or {})

    @property
    def _config(self) -> DrawingsConfig:
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        size = self._config.image_size
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "background": tfds.features.ClassLabel(names=list(BACKGROUNDS)),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=self._config.description, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[str, dict]]]:
        return {split: self._generate_examples(split) for split in VARIANTS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        return itertools.islice(self._all_examples(split), self._sizes.get(split))

    def _all_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        chosen = [drawing for drawing in drawings() if is_held_out(drawing) == (split == "held_out")]
        seed = zlib.crc32(f"{self._config.name}/{self.VERSION}/{split}".encode())
        for drawing, variant in itertools.product(chosen, range(VARIANTS[split])):
            rng = np.random.default_rng([seed, zlib.crc32(drawing.code.encode()), variant])
            identity = f"{split}_{drawing.code}_{variant}"
            yield identity, {"id": identity, **generate_example(drawing, self._config.image_size, rng)}


def is_held_out(drawing: Drawing) -> bool:
    """Whether training never shows the drawing or one of its family."""
    return zlib.crc32(drawing.family.encode()) % _HELD_OUT == 0


def generate_example(drawing: Drawing, image_size: int, rng: np.random.Generator) -> dict[str, Any]:
    """A drawing, placed at random on a random background, in the form the builder stores: the picture as PNG bytes."""
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    color = BACKGROUNDS[background]
    side = round(image_size * rng.uniform(*SCALES))
    top, left = rng.integers(0, image_size - side + 1, size=2)
    pixels = np.full((image_size, image_size, 3), color, np.uint8)
    pixels[top : top + side, left : left + side] = render(drawing, side, color)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, format="PNG")
    return {
        "image": picture.getvalue(),
        "captions": list(write_captions(drawing, background)),
        "background": background,
    }


def write_captions(drawing: Drawing, background: str) -> tuple[str, ...]:
    """Captions of a drawing: with and without the background, by each of its names."""
    captions = []
    for name in drawing.names:
        captions += [f"{name} on a {background} background", f"a drawing of {name}", name]
    return (*captions, f"{drawing.names[-1]}, drawn on {background}")
