"""How every command starts and ends: argument parsing, one-line errors, exit codes."""

import argparse
import sys
from collections.abc import Callable, Sequence

from cli.accelerators import spare_the_search_for_a_tpu
from cli.compilation_cache import keep_compiled_programs
from cli.errors import EXIT_OK, UserError
from cli.xla_flags import convolve_with_eigen


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Returns the argument parser of `python -m command`; a wrong argument raises UserError."""
    return _Parser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Calls `main(arguments)` and ends the process with the exit code of the contract.

    A UserError, or what a store of objects refuses, becomes one line on stderr and exit code 2; a store that does not
    answer, one line and 1. Ctrl-C outside a training loop ends quietly with 130. Any other exception keeps its
    traceback and Python's exit code 1.
    """
    spare_the_search_for_a_tpu()
    keep_compiled_programs()
    convolve_with_eigen()
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = _say(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader (head, less) went away; pointing stdout at nothing keeps the interpreter's last flush quiet.
        sys.stdout = None  # pyright: ignore[reportAttributeAccessIssue]
        code = EXIT_OK
    except Exception as error:
        from cli.locations import explain

        if (explained := explain(error)) is None:
            raise
        code = _say(explained)
    sys.exit(EXIT_OK if code is None else code)


def _say(error: UserError) -> int:
    """Prints an error as one line; returns the exit code that belongs to it."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code
