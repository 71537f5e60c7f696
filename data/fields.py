"""Which fields of a stored dataset hold pictures and captions: those that a config names, or those of usual names."""

import functools
import multiprocessing
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cli.errors import UserError

# What people call fields of pictures and of captions, in stored datasets as in the files that they are made of; the
# likelier first.
IMAGE_FIELDS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo")
TEXT_FIELDS = (
    *("captions", "caption", "text", "texts", "txt", "prompt", "prompts", "description", "sentence", "sentences"),
    *("comment", "alt_text", "alt", "title"),
)

_COLUMNS = ("text", "caption", "raw")  # of a table of captions, as COCO has it


def find_image_field(features: Mapping[str, Any], named: str, dataset: str) -> str:
    """Returns the field of pictures: files as bytes, or uint8 arrays.

    Args:
      features: name -> TFDS feature.
      named: what the user says; "" for a usual name, or else the only field of pictures that there is.
      dataset: its name, for messages.

    Raises:
      UserError: if there is none, or its numbers have no agreed white.
    """
    able = [name for name, feature in sorted(features.items()) if _holds_pictures(feature)]
    found = _named(features, able, named, IMAGE_FIELDS, ("image", "pictures"), dataset)
    files = [name for name in able if isinstance(features[name], tfds.features.Image)]
    if found is None and len(files) == 1:
        found = files[0]
    if found is None:
        raise UserError(
            f"dataset {dataset} has no field of pictures of a usual name (it has: {', '.join(sorted(features))}); "
            "name one with config.data.image_field"
        )
    if isinstance(features[found], tfds.features.Image) and features[found].np_dtype == np.float32:
        # TFDS stores the four bytes of a float as four channels.
        raise UserError(f"field {found!r} of {dataset} holds floats, without an agreed white; prepare it as 8 bits")
    if not named and found != IMAGE_FIELDS[0]:
        _say(f"{dataset}: pictures are read from its field {found!r}; config.data.image_field names another")
    return found


def find_text_field(features: Mapping[str, Any], named: str, dataset: str) -> str | None:
    """Returns the field of captions, one or several a record; None if there is none.

    Arguments as of `find_image_field`.

    Raises:
      UserError: if a user's field is missing, or holds numbers, classes or something else that is no text.
    """
    able = [name for name, feature in sorted(features.items()) if _holds_text(feature)]
    found = _named(features, able, named, TEXT_FIELDS, ("text", "captions"), dataset)
    others = [name for name in TEXT_FIELDS if name in able and name != found]
    if found is not None and not named and (others or found not in TEXT_FIELDS[:3]):
        also = f" (it has {', '.join(others)} too)" if others else ""
        _say(f"{dataset}: captions are read from its field {found!r}{also}; config.data.text_field names another")
    return found


def no_captions(features: Mapping[str, Any], dataset: str) -> UserError:
    """What to raise where captions are needed and `find_text_field` found none."""
    return UserError(
        f"dataset {dataset} has no field of captions of a usual name (it has: {', '.join(sorted(features))}); "
        "name one with config.data.text_field, or choose what needs no captions"
    )


def captions_of(value: Any) -> tuple[str, ...]:
    """All captions of a record's field: one, several, or a table with a column of them. Blank ones say nothing."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in _COLUMNS if name in value), ())
    values = [value] if isinstance(value, str | bytes) else np.asarray(value, object).ravel().tolist()
    texts = (text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in values)
    return tuple(text for text in texts if text.strip())


def _named(
    features: Mapping[str, Any],
    able: list[str],
    named: str,
    usual: tuple[str, ...],
    words: tuple[str, str],
    dataset: str,
) -> str | None:
    """The field that a user names, or the first of a usual name; `words` are the setting and what it is to hold."""
    if not named:
        return next((name for name in usual if name in able), None)
    if named not in features:
        raise UserError(
            f"dataset {dataset} has no field {named!r} (it has: {', '.join(sorted(features))}); set "
            f"config.data.{words[0]}_field, or leave it empty for a usual name"
        )
    if named not in able:
        holds = ", ".join(able) or "none of its fields"
        raise UserError(
            f"field {named!r} of {dataset} holds no {words[1]} ({holds} can); set config.data.{words[0]}_field"
        )
    return named


def _holds_pictures(feature: Any) -> bool:
    if isinstance(feature, tfds.features.LabeledImage):  # a class for each pixel
        return False
    if isinstance(feature, tfds.features.Image):
        return True
    if type(feature) is not tfds.features.Tensor:
        return False
    rank = len(feature.shape)
    return feature.np_dtype == np.uint8 and rank in (2, 3) or feature.np_dtype == np.object_ and rank == 0


def _holds_text(feature: Any) -> bool:
    if isinstance(feature, tfds.features.FeaturesDict):
        return any(name in feature and _holds_text(feature[name]) for name in _COLUMNS)
    if isinstance(feature, tfds.features.Sequence):
        return _holds_text(feature.feature)
    plain = isinstance(feature, tfds.features.Text) or type(feature) is tfds.features.Tensor
    return plain and feature.np_dtype == np.object_ and len(feature.shape) < 2


@functools.cache
def _say(line: str) -> None:
    """Prints a line once; in a process that reads for another one, that one has said it."""
    if multiprocessing.parent_process() is None:
        print(line, flush=True)
