"""The stored values of a record, from the bytes of its message.

What nearly every dataset has, files of pictures, texts and class numbers, is taken from the message as it stands. TFDS'
own parser reads records of whatever else too; of these it gives the same, through layers that take longer than a small
picture.
"""

from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

_EXAMPLE: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue], a class that is made when imported


class RecordParser:
    """Parses the records of a dataset, in some of its fields."""

    def __init__(self, features: Mapping[str, Any]):
        """Takes the fields that are wanted: name -> TFDS feature. Those of pictures stay the bytes of their files."""
        self._features = tfds.features.FeaturesDict(dict(features))
        # TFDS' own decoder takes a file's numbers for colors, whatever they stand for.
        files = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
        self._decoders = {name: tfds.decode.SkipDecoding() for name in files} or None
        self._kinds = {name: _kind(feature) for name, feature in features.items()}
        self._plain = None not in self._kinds.values()

    def parse(self, record: bytes) -> dict[str, Any]:
        """Returns name -> value: bytes of a file or a text, several texts as a sequence, a class as int, or TFDS'."""
        values = self._take(record) if self._plain else None
        if values is not None:
            return values
        rest: Any = self._features.deserialize_example_np(record, decoders=self._decoders)  # pyright: ignore[reportArgumentType]
        return rest

    def _take(self, record: bytes) -> dict[str, Any] | None:
        """The values, where each is in the record and of the kind that its feature says; otherwise TFDS says why."""
        stored = _EXAMPLE.FromString(record).features.feature
        values: dict[str, Any] = {}
        for name, kind in self._kinds.items():
            if kind is None or name not in stored:
                return None
            (written, alone), field = kind, stored[name]
            if field.WhichOneof("kind") != written:
                return None
            found = getattr(field, written).value
            if alone and len(found) != 1:
                return None
            values[name] = found[0] if alone else list(found)
        return values


def _kind(feature: Any) -> tuple[str, bool] | None:
    """How a message keeps a field, and whether that is one value; None if TFDS is to read it."""
    if isinstance(feature, tfds.features.Image) or type(feature) is tfds.features.Text:
        return "bytes_list", True
    if isinstance(feature, tfds.features.ClassLabel):
        return "int64_list", True
    if isinstance(feature, tfds.features.Sequence) and type(feature.feature) is tfds.features.Text:
        return "bytes_list", False
    return None
