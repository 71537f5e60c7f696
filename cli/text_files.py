"""The one reader of text files that people write: prompts, names of classes, templates, captions, JSON."""

import os

from cli.errors import UserError
from cli.locations import locate

MARK = "\ufeff"  # what some editors put in front of UTF-8
LIMIT = 1 << 26  # bytes: 64 MiB, far above any list that is written by hand


def read_text(path: str | os.PathLike[str], what: str = "file", limit: int = LIMIT) -> str:
    """Reads UTF-8, with or without a byte order mark, whose lines end in a line feed or in CR and line feed.

    Nothing else ends a line: a form feed or a line separator of Unicode inside a sentence belongs to the sentence.

    Args:
      path: of the file, here or in a store, or of a pipe.
      what: names the file in errors, such as "prompt file".
      limit: most bytes that are read.

    Returns:
      The text without the mark, each line ended by a line feed alone; "" of an empty file.

    Raises:
      UserError: names the file, if it is missing, cannot be read, is too large, or is not UTF-8.
    """
    try:
        with locate(path).open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise UserError(f"there is no {what} {path}") from None
    except IsADirectoryError:
        raise UserError(f"the {what} {path} is a folder; name a file") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > limit:
        raise UserError(f"the {what} {path} is larger than {limit >> 20} MiB; split it")
    try:
        return decode(data)
    except ValueError as error:
        raise UserError(f"the {what} {path} {error}; save it as UTF-8") from None


def decode(data: bytes) -> str:
    """The text of a file's bytes, as `read_text` returns it.

    Raises:
      ValueError: says what the bytes are in place of UTF-8.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start} is {data[error.start]:#04x})") from None
    if "\0" in text:
        raise ValueError("holds a NUL byte, so it is not UTF-8 text")
    return text.removeprefix(MARK).replace("\r\n", "\n")


def read_lines(path: str | os.PathLike[str], what: str = "file", limit: int = LIMIT) -> tuple[str, ...]:
    """Reads a list of one entry a line; blanks around an entry, and blank lines, are left out.

    Args:
      path: as `read_text`.
      what: as `read_text`.
      limit: as `read_text`.

    Raises:
      UserError: as `read_text`, and if there is no entry.
    """
    # Files with marks that were joined have one inside.
    lines = (line.removeprefix(MARK).strip() for line in read_text(path, what, limit).split("\n"))
    entries = tuple(line for line in lines if line)
    if not entries:
        raise UserError(f"the {what} {path} is empty; write one entry a line")
    return entries
