"""The TFDS builder of the embedded dataset: `scenes/single32`, `pair32`, `pair64`, `heart32`. Needs no TensorFlow.

Nothing is downloaded: an example is a function of (world, version, split, index) alone. Store it as ArrayRecord
(`file_format="array_record"`), the format that is read at random and without TensorFlow.
"""

import dataclasses
import io
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data.scenes.captions import write_captions
from data.scenes.render import render, sample_layout
from data.scenes.scene import WORLDS, World, sample_scene

SPLITS = ("train", "validation", "held_out")


@dataclasses.dataclass(eq=False, kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
    """One world and how many examples of it each split gets.

    Attributes:
      world: what the pictures show.
      sizes: split name -> number of examples.
    """

    world: World
    sizes: Mapping[str, int]


class Builder(tfds.core.GeneratorBasedBuilder):
    """Rendered pictures of one to three colored shapes, with captions in several wordings.

    Splits: `train` and `validation` never show a held-out (shape, color) pair; every scene of `held_out` shows one.
    """

    SPLITS = SPLITS
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [
        ScenesConfig(
            name="single32",
            description="One object of 5 shapes, 6 colors and 2 sizes on 3 backgrounds, 32 x 32 pixels.",
            world=WORLDS["single32"],
            sizes={"train": 20_000, "validation": 2_000, "held_out": 2_000},
        ),
        ScenesConfig(
            name="pair32",
            description="One or two objects of 8 shapes, 8 colors and 2 sizes on 4 backgrounds, 32 x 32 pixels.",
            world=WORLDS["pair32"],
            sizes={"train": 60_000, "validation": 2_000, "held_out": 2_000},
        ),
        ScenesConfig(
            name="pair64",
            description="One to three objects of 8 shapes, 8 colors and 2 sizes on 4 backgrounds, 64 x 64 pixels.",
            world=WORLDS["pair64"],
            sizes={"train": 100_000, "validation": 2_000, "held_out": 2_000},
        ),
        ScenesConfig(
            name="heart32",
            description="The shape that single32 lacks, 20 pictures of it to train on; held out are its other shapes.",
            world=WORLDS["heart32"],
            sizes={"train": 20, "validation": 500, "held_out": 1_000},
        ),
    ]

    def __init__(self, *, sizes: Mapping[str, int] | None = None, **kwargs: Any):
        """Makes a builder.

        Args:
          sizes: split name -> number of examples, where it is not the config's own.
          **kwargs: those of every TFDS builder: config, data_dir, version, file_format.
        """
        super().__init__(**kwargs)
        self.split_sizes = {**self._config.sizes, **(sizes or {})}

    @property
    def _config(self) -> ScenesConfig:
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        """The features: parallel sequences `objects/...` give each object's attributes, in the captions' order."""
        world = self._config.world
        objects = {"shape": world.shapes, "color": world.colors, "size": world.sizes}
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(world.image_size, world.image_size, 3), encoding_format="png"),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "background": tfds.features.ClassLabel(names=list(world.backgrounds)),
                "relation": tfds.features.ClassLabel(names=["none", *world.relations]),
                "objects": tfds.features.Sequence(
                    {key: tfds.features.ClassLabel(names=list(names)) for key, names in objects.items()}
                ),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=self._config.description, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[str, dict]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        world, version = self._config.world, str(self.VERSION)
        for index in range(self.split_sizes[split]):
            example = generate_example(world, version, split, index)
            yield example["id"], example


def generate_example(world: World, version: str, split: str, index: int) -> dict[str, Any]:
    """One example in the form the builder stores: the picture as PNG bytes, labels by name.

    It depends on its four arguments alone, not on the size of the split or on any other example.
    """
    rng = np.random.default_rng([zlib.crc32(f"{world.name}/{version}/{split}".encode()), index])
    scene = sample_scene(world, rng, held_out=split == "held_out")
    picture = io.BytesIO()
    pixels = render(world, scene, sample_layout(world, scene, rng))
    # Flat pictures stay small at any level, and writing them is a good part of the time.
    Image.fromarray(pixels).save(picture, format="PNG", compress_level=1)
    return {
        "id": f"{split}_{index:06d}",
        "image": picture.getvalue(),
        "captions": list(write_captions(world, scene)),
        "background": scene.background,
        "relation": scene.relation or "none",
        "objects": [dataclasses.asdict(item) for item in scene.objects],
    }
