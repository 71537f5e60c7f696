"""Values of a record are those that TFDS gives, whichever way they are read."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data.fields import captions_of
from data.record_parser import RecordParser

PLAIN = {
    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
    "captions": tfds.features.Sequence(tfds.features.Text()),
    "title": tfds.features.Text(),
    "color": tfds.features.ClassLabel(names=["red", "blue"]),
}
OTHER = {"place": tfds.features.Tensor(shape=(2,), dtype=np.float32)}
VALUES = {
    "image": b"\x89PNG, unread",
    "title": "ein Bär",
    "color": "blue",
    "place": np.float32([0.25, 2]),
}


def of_tfds(features: dict, record: bytes) -> dict:
    decoders = {"image": tfds.decode.SkipDecoding()}
    return dict(tfds.features.FeaturesDict(features).deserialize_example_np(record, decoders=decoders))


@pytest.mark.parametrize("features", [PLAIN, PLAIN | OTHER])
@pytest.mark.parametrize("captions", [[], ["a star"], ["a star", "", "a circle"]])
def test_values_are_those_of_tfds(features, captions, monkeypatch):
    stored = PLAIN | OTHER  # more than is asked for
    record = tfds.features.FeaturesDict(stored).serialize_example({**VALUES, "captions": captions})
    expected = of_tfds(features, record)
    if features is PLAIN:  # none of TFDS' own parser is needed
        monkeypatch.setattr(tfds.features.FeaturesDict, "deserialize_example_np", None)
    values = RecordParser(features).parse(record)
    assert values.keys() == expected.keys() == features.keys()
    assert captions_of(values["captions"]) == captions_of(expected["captions"]) == tuple(filter(None, captions))
    assert all(values[name] == expected[name] for name in ("image", "title", "color"))
    assert type(values["image"]) is type(values["title"]) is bytes and type(values["color"]) is int
    if features is not PLAIN:
        assert (values["place"] == VALUES["place"]).all()


def test_a_record_that_lacks_a_field_is_left_to_tfds():
    record = tfds.features.FeaturesDict({"title": PLAIN["title"]}).serialize_example({"title": "a"})
    errors = []
    for read in (RecordParser(PLAIN).parse, lambda data: of_tfds(PLAIN, data)):
        with pytest.raises(Exception) as caught:  # noqa: PT011, whatever TFDS raises
            read(record)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
