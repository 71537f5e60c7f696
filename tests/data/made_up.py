"""A dataset that is not the embedded one, as TFDS keeps those of other people."""

import contextlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

NAME = "made_up"


def prepare_made_up(
    folder: Path,
    features: Mapping[str, tfds.features.FeatureConnector],
    splits: Mapping[str, Iterable[Mapping]],
    image: tuple[str, tfds.features.FeatureConnector] | None = None,
) -> None:
    """Writes the dataset `made_up` of pictures of any size and other fields.

    Args:
      folder: where datasets are kept.
      features: of the fields but `image`.
      image: the name and feature of the pictures' field; None for `image`, of RGB files.
      splits: name -> records; an `image` is the bytes of a file, an array, or a color of a picture of 50 x 40 pixels.
    """
    name, feature = image or ("image", tfds.features.Image(shape=(None, None, 3), encoding_format="png"))

    class MadeUp(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            fields = tfds.features.FeaturesDict({name: feature, **features})
            return tfds.core.DatasetInfo(builder=self, features=fields)

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(records) for name, records in splits.items()}

        def _generate_examples(self, records):
            for place, record in enumerate(records):
                whole = dict(record) if type(feature) is tfds.features.Tensor else with_file(record)
                yield place, {name: whole.pop("image"), **whole}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        MadeUp(data_dir=folder, file_format="array_record").download_and_prepare()


def with_file(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its picture as a file's bytes."""
    image = record.get("image", "black")
    if isinstance(image, bytes):
        return dict(record)
    picture = Image.new("RGB", (50, 40), image) if isinstance(image, str) else Image.fromarray(image)
    picture.save(file := io.BytesIO(), "PNG")
    return {**record, "image": file.getvalue()}
