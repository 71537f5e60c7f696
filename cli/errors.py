"""The one error a user is meant to read, and the exit codes of every command."""

EXIT_OK = 0
EXIT_FAILURE = 1  # anything unexpected: a traceback is printed
EXIT_USER_ERROR = 2  # a user's mistake: one clear line
EXIT_PREEMPTED = 75  # saved; start the same command again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """A mistake in a config, file, prompt, checkpoint or record.

    Its message is one line that says what is wrong and what to do. Commands print it without a traceback and exit 2.
    """

    exit_code = EXIT_USER_ERROR


class Outage(UserError):
    """What is elsewhere does not answer just now, which is nobody's mistake: also one line, but exit code 1."""

    exit_code = EXIT_FAILURE
