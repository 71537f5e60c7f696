"""How a command ends."""

import pytest

from cli import command
from cli.errors import UserError


def exit_code(main, monkeypatch) -> object:
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as end:
        command.run(main)
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
        command.run(main)


def test_a_wrong_argument_names_the_help(monkeypatch, capsys):
    def main(arguments):
        command.parser("thing", "Does things.").parse_args(["--nope"])

    assert exit_code(main, monkeypatch) == 2
    assert "python -m thing --help" in capsys.readouterr().err
