"""A table that is written into a page a row at a time."""

import pytest

from cli.errors import UserError
from cost.page_table import PageTable


@pytest.fixture
def table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nText.\n\n| name | size | value |\n|---|---|---|\n\nMore text.\n")
    return PageTable(page, ("name", "size", "value"), ("name", "size"))


def test_a_table_is_written_a_row_at_a_time(table):
    first, other = ({"name": "a", "size": size, "value": "1"} for size in ("2", "4"))
    table.write(first)
    table.write(other)
    assert table.read() == [first, other]
    changed = {**first, "value": "9"}
    table.write(changed)
    assert table.read() == [changed, other]
    assert table.find("a", "4") == other
    assert table.find("a", "8") is None
    lines = table.page.read_text().splitlines()
    assert lines[:3] == ["# Title", "", "Text."] and lines[-2:] == ["", "More text."]


def test_two_tables_share_a_page(table):
    table.page.write_text(table.page.read_text() + "\n| other | value |\n|---|---|\n")
    second = PageTable(table.page, ("other", "value"), ("other",))
    second.write({"other": "b", "value": "2"})
    table.write({"name": "a", "size": "2", "value": "1"})
    assert [row["value"] for row in second.read()] == ["2"]
    assert [row["value"] for row in table.read()] == ["1"]


def test_a_page_without_the_table_is_named(table):
    with pytest.raises(UserError, match="page.md has no table with the columns name, value"):
        PageTable(table.page, ("name", "value"), ("name",)).read()
    table.page.unlink()
    with pytest.raises(UserError, match="there is no page .*page.md"):
        table.read()
