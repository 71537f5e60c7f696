"""How a command ends."""

import pytest

from cli import entry_point
from cli.errors import UserError


def exit_code(main, monkeypatch) -> object:
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as end:
        entry_point.run(main)
    return end.value.code


def test_a_user_error_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(arguments):
        raise UserError("first\n  second")

    assert exit_code(main, monkeypatch) == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_the_exit_code_of_main_is_kept(monkeypatch):
    assert exit_code(lambda arguments: 75, monkeypatch) == 75
    assert exit_code(lambda arguments: None, monkeypatch) == 0


def test_an_interrupt_is_quiet(monkeypatch, capsys):
    def main(arguments):
        raise KeyboardInterrupt

    assert exit_code(main, monkeypatch) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_anything_else_keeps_its_traceback(monkeypatch):
    def main(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        entry_point.run(main)


def test_a_wrong_argument_names_the_help(monkeypatch, capsys):
    def main(arguments):
        entry_point.parser("thing", "Does things.").parse_args(["--nope"])

    assert exit_code(main, monkeypatch) == 2
    assert "python -m thing --help" in capsys.readouterr().err
