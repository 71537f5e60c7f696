"""Programs of the checkout, started one at a time, and stopped where their time is over."""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.errors import EXIT_OK, UserError

ROOT = Path(__file__).resolve().parents[1]


class OutOfTime(UserError):
    """A program was stopped."""


def run_command(
    command: Sequence[str],
    seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    patience: float = 0.0,
    codes: Collection[int] = (EXIT_OK,),
) -> int:
    """Runs a program from the checkout, and waits for it.

    Args:
      command: the program and its arguments.
      seconds: that it may take; None for any.
      environment: variables beside those of this process.
      patience: seconds for a program to save what it has when its time is over (SIGTERM); 0 to end it at once.
      codes: exit codes that are no failure.

    Returns:
      Its exit code.

    Raises:
      OutOfTime: if it had to be ended.
      UserError: if it failed, with the last line that it said.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(patience)
            except subprocess.TimeoutExpired:
                raise OutOfTime(f"stopped after {seconds:.0f} s") from error
            if code not in codes:
                raise OutOfTime(f"stopped after {seconds:.0f} s") from error
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code not in codes:
            said.seek(0)
            lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
            raise UserError(lines[-1] if lines else f"it ended with {code}")
        return code


def read_json(path: Path) -> Any:
    """What a program wrote. Raises UserError if there is nothing."""
    if not path.is_file():
        raise UserError(f"{path.name} was not written")
    return json.loads(path.read_text(encoding="utf-8"))
