"""Captions and classes out of what stands beside a picture: text files, JSON files, values of a table."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cli.errors import UserError
from cli.text_files import MARK, decode
from data import fields
from data.folder.items import MAX_TEXT, Rejected, shown

# What people call these fields; the first that is there is taken, in any case of letters.
IMAGE_FIELDS = (
    *("file_name", "filename", "file", "filepath", "file_path", "image", "image_file", "image_name", "image_path"),
    *(*fields.IMAGE_FIELDS, "path", "name", "bytes"),
)
TEXT_FIELDS = fields.TEXT_FIELDS
LABEL_FIELDS = ("label", "labels", "class", "cls", "category", "fine_label")

_MAX_DEPTH = 20  # of lists and objects around a caption
_MAX_CLASS = 2**20  # numbers below it number classes: all smaller ones get a name
_WHOLE = re.compile(r"(-?[0-9]+)(?:\.0+)?")  # pandas writes 3.0 where another row lacks a class


def choose_field(asked: str, known: Sequence[str], guesses: Sequence[str], option: str, where: str) -> str | None:
    """The field of `known` that a user asked for, or the first of those that are guessed; None if there is none.

    Raises:
      UserError: if the field that was asked for is not there.
    """
    if asked:
        if asked not in known:
            choices = shown(", ".join(known)[:1000]) or "none"
            raise UserError(f"{where} has no field {asked!r}; choose --{option} of {choices}")
        return asked
    lower = {name.lower().strip(): name for name in reversed(known)}
    return next((lower[guess] for guess in guesses if guess in lower), None)


def decode_text(data: bytes) -> str:
    """Text of UTF-8, with or without a mark.

    Raises:
      Rejected: if it is something else, or longer than a caption can be.
    """
    if len(data) > MAX_TEXT:
        raise Rejected("bad caption", f"{len(data):,} bytes of text")
    try:
        return decode(data)
    except ValueError as error:
        raise Rejected("bad caption", str(error)) from error


def captions_of_text(text: str) -> tuple[str, ...]:
    """A caption for each line that is not empty; line feeds alone end lines."""
    return clean_captions(text.split("\n"))


def captions_of_sidecars(
    texts: Mapping[str, bytes | Rejected], text_field: str = "", label_field: str = ""
) -> tuple[tuple[str, ...], str | int | None]:
    """The captions and the class that files beside a picture give it.

    Args:
      texts: ".txt", ".json" -> what the file holds, or why it cannot be read. Text is preferred where both are there,
        unless there is a `text_field`.
      text_field: of the JSON object; "" for the first of `TEXT_FIELDS` that it has.
      label_field: of the JSON object; "" for none.

    Raises:
      Rejected: if a file that is asked for cannot be read.
    """
    captions: tuple[str, ...] = ()
    label: str | int | None = None
    if ".txt" in texts and not (text_field and ".json" in texts):
        captions = captions_of_text(decode_text(readable(texts[".txt"])))
    if ".json" in texts and (not captions or label_field):
        value = parse_json(decode_text(readable(texts[".json"])))
        if not isinstance(value, dict):
            raise Rejected("bad caption", "no JSON object")
        name = text_field or choose_field("", list(value), TEXT_FIELDS, "", "")
        captions = captions or captions_of_value(value.get(name))
        label = class_of_value(value.get(label_field)) if label_field else None
    return captions, label


def readable(text: bytes | Rejected) -> bytes:
    """What a file holds.

    Raises:
      Rejected: if that is why it cannot be read.
    """
    if isinstance(text, Rejected):
        raise text
    return text


def captions_of_value(value: Any, depth: int = 0) -> tuple[str, ...]:
    """A text, a list of texts, or (COCO) a list of objects or an object that have such a field, as captions.

    Raises:
      Rejected: if one cannot be written, or they are nested deeper than anybody would.
    """
    if isinstance(value, str):
        return clean_captions([value])
    if depth > _MAX_DEPTH:
        raise Rejected("bad caption", f"nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        name = choose_field("", [str(key) for key in value], (*TEXT_FIELDS, "raw"), "", "")
        return captions_of_value(value[name], depth + 1) if name in value else ()
    if isinstance(value, list | tuple):
        return tuple(caption for each in value[:1000] for caption in captions_of_value(each, depth + 1))
    return ()


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
      Rejected: if it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("bad caption", f"not JSON: {' '.join(str(error).split())}") from error


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts without space around them, and without the mark of a file that was joined, each once; none is empty.

    Raises:
      Rejected: if one cannot be written as UTF-8: half of a surrogate pair, which JSON can spell.
    """
    stripped = (text.strip().removeprefix(MARK).strip() for text in texts)
    captions = tuple(dict.fromkeys(text for text in stripped if text))
    try:
        size = sum(len(caption.encode()) for caption in captions)
    except UnicodeEncodeError as error:
        raise Rejected("bad caption", "half of a surrogate pair") from error
    if size > MAX_TEXT:
        raise Rejected("bad caption", f"{size:,} bytes of text")
    return captions


def class_of_value(value: Any) -> str | int | None:
    """The class that a field's value names; None where it is hidden (a number below 0) or missing.

    A number is one however it is written: 3, 3.0, "3" and "3.0" are the same class. Fractions, and numbers of 2**20 and
    more, are names.

    Raises:
      Rejected: if its name cannot be written as UTF-8.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value != value:
            return None  # what pandas writes where there is none
        value = int(value) if value.is_integer() else str(value)
    if isinstance(value, int):
        value = str(value)
    if isinstance(value, str) and value.strip():
        text = " ".join(value.split())[:1000].strip()
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Rejected("bad caption", "half of a surrogate pair in the name of a class")
        if not (match := _WHOLE.fullmatch(text)):
            return text
        number = int(match[1])
        if number < 0:
            return None
        return number if number < _MAX_CLASS and len(match[1]) < 8 else match[1]
    return None
