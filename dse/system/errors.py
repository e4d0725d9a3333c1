"""The two kinds of errors that users see, and any exception in one line."""


class InputError(Exception):
    """The user's input cannot be used. The message is one line: what is wrong, what was expected, how to mend it."""

    exit_code = 2


class RunError(Exception):
    """Work that began well cannot continue. The message is one line: what happened, what is safe, what to do."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """An exception in one line: its class and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
