"""The two errors that a user meets, and how an exception is told in one line."""


class InputError(Exception):
    """The user's input cannot be used. The message is one line: what is wrong, what was expected, how to mend it."""


class RunError(Exception):
    """Work that began well cannot go on. The message is one line: what happened, what is safe, what to do."""


def one_line(error: BaseException) -> str:
    """An exception in one line: its kind and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
