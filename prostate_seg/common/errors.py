"""Errors with a message for the user.

`__main__` prints the message without a traceback. Every other exception is a defect of the program and keeps its traceback.
"""

from collections.abc import Sequence


class InputError(ValueError):
    """An input or a workspace cannot be used; the message has the case, the rule and the next step (exit code 1)."""


class VolumeError(InputError):
    """A file or folder is not a usable volume; the caller adds its name and the case."""

    def __init__(self, message: str, check: str = "unreadable") -> None:
        super().__init__(message)
        self.check = check
        """Name of the quality check that failed, such as missing_slice."""


class Pruned(Exception):  # noqa: N818 - no error: the pruner of the study stopped the trial
    """A trial of a sweep was pruned; the message has its epoch and value."""


class ConfigError(ValueError):
    """A setting cannot be used; the message has the key, the rule and the value (exit code 2)."""


def first_line(error: object) -> str:
    """Return the first line of an error's text; empty if it has no text."""
    return next(iter(str(error).strip().splitlines()), "")


def listed(values: Sequence[object], *, most: int = 5) -> str:
    """Return the first values and the number of the others, for a message."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + more
