"""Errors that are meant for users: the value, what was allowed, how to fix it."""


class SparringError(Exception):
    """A mistake in input or environment. The command line prints the message without a traceback.

    `exit_code` follows the house rule: 1 failed, 2 usage, 75 stopped and resumable.
    """

    exit_code = 1


class UsageError(SparringError):
    """A wrong command, recipe key or option."""

    exit_code = 2


class Stopped(SparringError):
    """Stopped by a signal after saving; running the same command again goes on."""

    exit_code = 75


def defect(error: Exception) -> str:
    """What to say of an error that is nobody's input: its traceback is for those who mend it."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile(
        "w", prefix="sparring-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return (
        f"a defect of sparring: {type(error).__name__}: {error}\n"
        f"The traceback is in {file.name}; please report it."
    )
