"""A table on a page in Markdown that is written a row at a time and read again: what a command has found so far."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from cli.errors import UserError
from cli.text_files import read_text

Row = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class PageTable:
    """The table of a page that has these columns.

    Attributes:
      page: in Markdown; the header is there already.
      columns: in order.
      keys: the columns by which a row is known again.
    """

    page: Path
    columns: tuple[str, ...]
    keys: tuple[str, ...]

    def read(self) -> list[dict[str, str]]:
        """Reads the rows.

        Raises:
          UserError: if the page is missing or has no such table.
        """
        lines = self._lines()
        rows = []
        for line in lines[self._header(lines) + 2 :]:
            if not line.startswith("|"):
                break
            cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append(dict(zip(self.columns, cells, strict=True)))
        return rows

    def find(self, *key: str) -> dict[str, str] | None:
        """The row whose `keys` have these texts."""
        return next((row for row in self.read() if self._key(row) == key), None)

    def write(self, row: Row) -> None:
        """Puts a row in the place of the one with its key, or after the last one.

        Raises:
          UserError: if the page is missing or has no such table.
        """
        lines = self._lines()
        keys = [self._key(each) for each in self.read()]
        first, key = self._header(lines) + 2, self._key(row)
        place = keys.index(key) if key in keys else len(keys)
        lines[first + place : first + place + (key in keys)] = [_line(row[column] for column in self.columns)]
        new = self.page.with_suffix(".tmp")
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
        new.replace(self.page)

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(row[column] for column in self.keys)

    def _lines(self) -> list[str]:
        return read_text(self.page, "page").removesuffix("\n").split("\n")

    def _header(self, lines: list[str]) -> int:
        """Number of the line with the column names."""
        if _line(self.columns) not in lines:
            raise UserError(f"{self.page} has no table with the columns {', '.join(self.columns)}")
        return lines.index(_line(self.columns))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
