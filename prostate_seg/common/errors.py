"""The errors that are written for people.

`__main__` prints their text without a traceback. Every other exception is a defect of ours and keeps its traceback.
"""


class InputError(ValueError):
    """An input or a workspace cannot be used; the text names the case, the rule and the next step (exit code 1)."""


class VolumeError(InputError):
    """A file or folder is not one usable volume; the caller adds its name and the case."""

    def __init__(self, message: str, check: str = "unreadable") -> None:
        super().__init__(message)
        self.check = check
        """Name of the check that refused it, such as missing_slice."""


class Pruned(Exception):  # noqa: N818 - no error: the study has asked for it
    """A trial of a sweep was stopped early because it is hopeless; the text says where it stood."""


class ConfigError(ValueError):
    """A setting cannot be used; the text names the key, the rule and the value (exit code 2)."""


def first_line(error: object) -> str:
    """Return the first line of an error's text; its class where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
