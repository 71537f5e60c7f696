"""What a sweep runs over: `--sweep KEY=V1,V2,...`, read and checked before anything is loaded."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cli.errors import UserError
from cli.ranges import check_seed
from cli.text_files import read_lines
from sample.arguments import SETTINGS

# What conditions hold that is written as text: its values may come from a file, and are numbered in file names.
TEXTS = ("prompt", "negative_prompt", "image")

# What an axis may be named, and what its values are.
KEYS = {
    **{name: setting.kind for name, setting in SETTINGS.items()},
    **{"seed": int, "label": int},
    **dict.fromkeys(TEXTS, str),
}

_NAMES = {int: "a whole number", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Axis:
    """One thing that differs between cells.

    Attributes:
      name: one of `KEYS`.
      values: what it takes, in order; distinct.
    """

    name: str
    values: tuple[Any, ...]

    def header(self, place: int) -> str:
        """What stands at a row or column: a prompt itself, a picture's name, otherwise "guidance=3"."""
        value = spell(self.values[place])
        if self.name == "image":
            return Path(value).name
        return value if self.name == "prompt" else f"{self.name}={value}"

    def file_part(self, place: int) -> str:
        """The part of a page's file name: "guidance_3"; texts are numbered from 1, as "prompt_1"."""
        value = str(place + 1) if self.name in TEXTS else spell(self.values[place]) or "default"
        return f"{self.name}_{value}"


def spell(value: Any) -> str:
    """A value as a person writes it: 3 for 3.0."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def parse_axes(
    texts: Sequence[str], given: Collection[str], keys: Mapping[str, type] = MappingProxyType(KEYS)
) -> tuple[Axis, ...]:
    """Reads the values of `--sweep`.

    Args:
      texts: such as "guidance=1,2,3" or "prompt=@captions.txt".
      given: keys that have a value of their own on the command line.
      keys: what an axis may be named, and what its values are.

    Raises:
      UserError: on an unknown, repeated or given key, no values, one that does not fit the key, or the same one twice.
    """
    axes: list[Axis] = []
    for text in texts:
        name, equals, values = text.partition("=")
        if name not in keys:
            raise UserError(f"--sweep {name}: there is no such key; choose from {', '.join(keys)}")
        if not equals or not values.strip():
            raise UserError(f"--sweep {name} has no values; give them as in --sweep {name}=V1,V2")
        if name in (axis.name for axis in axes):
            raise UserError(f"--sweep {name} stands twice; give all of its values at once, with commas")
        if name in given:
            raise UserError(f"--sweep {name} and --{name} are both given; leave one of them out")
        parsed = read_texts(_items(values), f"--sweep {name}") if name in TEXTS else _values(name, values, keys[name])
        twice = [value for value in parsed if parsed.count(value) > 1]
        if twice:
            raise UserError(f"--sweep {name} has {spell(twice[0])} twice; leave one out")
        axes.append(Axis(name, tuple(parsed)))
    return tuple(axes)


def read_texts(values: Sequence[str], flag: str) -> list[str]:
    """Texts of the command line, where @FILE stands for the lines of a file that are not empty.

    Raises:
      UserError: if there is no such file, it is empty or no text, or a text is empty.
    """
    texts: list[str] = []
    for value in values:
        if not value.startswith("@"):
            texts.append(value)
            continue
        texts += read_lines(value[1:], "prompt file")
    for text in () if flag.endswith("image") else texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # bytes of the command line that are no text in the terminal's encoding
            raise UserError(f"{flag}={text!r} is not UTF-8 text; write it in a file, {flag}=@FILE") from None
    if any(not text.strip() for text in texts):
        if flag.endswith("image"):
            raise UserError(f"{flag} is empty; name a picture file")
        what = "the prompt" if flag == "--prompt" else flag
        raise UserError(f"{what} is empty; describe a picture, for example {flag.split()[0]}={_example(flag)}")
    return texts


def _example(flag: str) -> str:
    caption = "'a small red circle'"
    return f"{flag.split()[1]}={caption}" if " " in flag else caption


def _items(values: str) -> list[str]:
    """A file's name may have commas."""
    return [values.strip()] if values.strip().startswith("@") else [item.strip() for item in values.split(",")]


def _values(name: str, values: str, kind: type) -> list[Any]:
    """Values of a setting, of the type that it has; "" is one of spacing alone."""
    parsed: list[Any] = []
    for item in (item.strip() for item in values.split(",")):
        if not item and name != "spacing":
            raise UserError(f"--sweep {name}={values} has an empty value; leave out a comma")
        try:
            parsed.append(kind(item))
        except ValueError:
            raise UserError(f"--sweep {name}={values}: {item!r} is not {_NAMES[kind]}") from None
        if name == "seed":
            check_seed("--sweep seed", parsed[-1])
    return parsed
