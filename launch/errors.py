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
