"""Programs that are started, stopped and asked why they failed."""

import sys
import time

import pytest

from cli.errors import UserError
from cost.commands import OutOfTime, read_json, run_command

_SAVES = """
import signal, sys, time
def save(*_):
    open(sys.argv[1], "w").write("{}")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + ".began", "w")
time.sleep(60)
"""


def python(program, *arguments):
    return [sys.executable, "-c", program, *map(str, arguments)]


def test_a_program_that_fails_says_its_last_line():
    with pytest.raises(UserError, match="^ValueError: two$"):
        run_command(python("print('one')\nraise ValueError('two')"))
    with pytest.raises(UserError, match="it ended with 3"):
        run_command(python("raise SystemExit(3)"))
    assert run_command(python("raise SystemExit(3)"), codes=(0, 3)) == 3
    assert run_command(python("import os; assert os.environ['TOLD'] == 'x'"), environment={"TOLD": "x"}) == 0


def test_a_program_whose_time_is_over_is_ended_or_saves(tmp_path):
    begun = time.monotonic()
    with pytest.raises(OutOfTime, match="stopped after 0 s"):
        run_command(python("import time; time.sleep(60)"), 0.2)
    assert time.monotonic() - begun < 30
    saved = tmp_path / "saved.json"
    assert run_command(python(_SAVES, saved), 2.0, patience=20.0, codes=(0, 75)) == 75
    assert read_json(saved) == {}
    with pytest.raises(UserError, match="none.json was not written"):
        read_json(tmp_path / "none.json")
