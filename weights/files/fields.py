"""What the keys of another project's document may hold: a table for each document, read in one way.

A document (config.json, nnet.json, the options beside a checkpoint) is data from elsewhere. Its table says of each key
what type, length and range ours can use and what the other project assumes where the key is left out. Whatever does not
fit is named together with its key, in one line. A key that no table has is refused too: it may well change what the
network computes. Keys that begin with "_" are a library's notes to itself.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from cli.errors import UserError

REQUIRED: Any = object()  # in place of a default

_MOST = 2**31 - 1  # of a count
_SHOWN = 60  # characters of a value in an error
_SHORT = reprlib.Repr()  # reads few entries of few levels: files may repeat one list in itself without end
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 2 * _SHOWN


@dataclasses.dataclass(frozen=True)
class Field:
    """What one key may hold.

    Attributes:
      description: of what it must be; continues "it must be".
      fits: whether a value is that.
      default: what the other project assumes of a key that is left out; `REQUIRED` if it may not be.
      item: of a list, what each entry must be.
      length: of a list: how many entries, or the key of another list that is as long; None for any number but 0.
      group: of an object, its keys.
    """

    description: str
    fits: Callable[[Any], bool]
    default: Any = REQUIRED
    item: "Field | None" = None
    length: int | str | None = None
    group: Mapping[str, "Field"] | None = None

    def or_null(self, default: Any = None) -> "Field":
        """The same, which may also be null."""
        fits = self.fits
        description = f"{self.description} or null"
        return dataclasses.replace(
            self, description=description, fits=lambda value: value is None or fits(value), default=default
        )


def whole(default: Any = REQUIRED, low: int = 1, high: int = _MOST) -> Field:
    """A whole number from `low` to `high`."""
    most = "" if high == _MOST else f" to {high}"
    return Field(f"a whole number from {low}{most}", lambda value: type(value) is int and low <= value <= high, default)


def real(
    default: Any = REQUIRED, low: int | float = -math.inf, high: int | float = math.inf, above: bool = False
) -> Field:
    """A finite number from `low` (`above`: more than that) to `high`."""
    words = [f"{'above' if above else 'from'} {low:g}"] * (low != -math.inf) + [f"up to {high:g}"] * (high != math.inf)

    def fits(value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        number = float(value) if abs(value) < 1e300 else math.inf
        return math.isfinite(number) and low <= number <= high and not (above and number == low)

    return Field(" ".join(("a number", *words)), fits, default)


def flag(default: Any = REQUIRED) -> Field:
    """True or false."""
    return Field("true or false", lambda value: type(value) is bool, default)


def word(default: Any = REQUIRED, choices: Collection[str] = ()) -> Field:
    """A string, one of `choices` if there are any."""
    description = f"one of {', '.join(choices)}" if choices else "a string"
    return Field(description, lambda value: type(value) is str and (not choices or value in choices), default)


def several(item: Field, default: Any = REQUIRED, length: int | str | None = None, single: bool = False) -> Field:
    """A list of what `item` says; `single`: or one such value in its place."""
    of = f"a list, each entry {item.description}"
    return Field(
        f"{item.description}, or {of}" if single else of,
        lambda value: isinstance(value, list | tuple) or (single and item.fits(value)),
        default,
        item=item,
        length=length,
    )


def group(fields: Mapping[str, Field], default: Any = REQUIRED) -> Field:
    """An object with keys of its own."""
    return Field("an object", lambda value: isinstance(value, Mapping), default, group=fields)


def fixed(value: Any, *same: Any) -> Field:
    """The one value that ours computes, or others that mean the same; a list of it says the same of all levels."""

    def one(given: Any) -> bool:
        if value is None and given in (False, "", []):
            return True
        return any(type(given) in _like(each) and given == each for each in (value, *same))

    def fits(given: Any) -> bool:
        if isinstance(given, list | tuple) and given and not isinstance(value, list | tuple):
            return all(one(entry) for entry in given)
        return one(given)

    return Field(repr(value), fits, value)


def _like(value: Any) -> tuple[type, ...]:
    """Types of a value that equals this one: true is no 1."""
    return (int, float) if type(value) in (int, float) else (type(value),)


# A key that changes nothing of what is computed.
IDLE = Field("anything", lambda value: True, None)


def read_fields(what: str, document: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Reads a document by its table.

    Args:
      what: names in errors what the document describes.
      document: a JSON value.
      fields: the table.

    Returns:
      {key: value} of all keys of the table, defaults filled in, those of groups too.

    Raises:
      UserError: if a key is missing, unknown or has another value than it may; one line that names all such keys.
    """
    if not isinstance(document, Mapping):
        raise UserError(f"{what} is described by {show(document)}, which is not a JSON object; fetch it again")
    problems: list[str] = []
    values = _read_group(document, fields, "", problems)
    if problems:
        raise UserError(f"{what} cannot be converted: {'; '.join(problems)}")
    return values


def _read_group(
    document: Mapping[str, Any], fields: Mapping[str, Field], prefix: str, problems: list[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, field in fields.items():
        value = document.get(key, field.default)
        if value is REQUIRED:
            problems.append(f"there is no {prefix}{key}")
        elif key in document and not field.fits(value):
            problems.append(f"{prefix}{key} is {show(value)}; it must be {field.description}")
        elif field.group is not None and value is not None:
            values[key] = _read_group(value, field.group, f"{prefix}{key}.", problems)
        else:
            values[key] = value
            problems += _list_problems(f"{prefix}{key}", value, field, document, fields)
    unknown = [f"{prefix}{key}" for key in document if key not in fields and not str(key).startswith("_")]
    if unknown:
        them = "it" if len(unknown) == 1 else "them"
        problems.append(
            f"{', '.join(unknown)}: not known here; if the network does not depend on {them}, "
            f"give --ignore_keys={','.join(key.rpartition('.')[2] for key in unknown)}"
        )
    return values


def _list_problems(
    key: str, value: Any, field: Field, document: Mapping[str, Any], fields: Mapping[str, Field]
) -> list[str]:
    """What is wrong with the entries of a list, or their number."""
    if field.item is None or not isinstance(value, list | tuple):
        return []
    for place, entry in enumerate(value):
        if not field.item.fits(entry):
            return [f"{key}[{place}] is {show(entry)}; it must be {field.item.description}"]
    length = field.length
    if isinstance(length, str):
        other = document.get(length, fields[length].default)
        if not isinstance(other, list | tuple):
            return []
        if len(value) != len(other):
            return [f"{key} has {len(value)} entries, {length} has {len(other)}"]
    elif length is not None and len(value) != length:
        return [f"{key} has {len(value)} entries; it must have {length}"]
    return [] if value else [f"{key} is an empty list"]


def show(value: Any) -> str:
    """A value of a document as an error names it: some of it where it is long, and never all of a long one's text."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        text = "a huge number"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
