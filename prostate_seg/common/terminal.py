"""Lines on standard output and standard error: wrapped at a terminal, one line each in a file or a pipe."""

import logging
import os
import re
import shutil
import sys
import textwrap
from typing import TextIO

COMMAND = re.compile(r"python -m |^ +(mlflow|dvc|git|make|pip) |^ +fix: ")
"""A line of a message that contains a command: it stays on one line, to be copied."""
SECOND_COLUMN = re.compile(r" *\S.{0,20}?\s{2,}(?=\S)")
"""The first column of a line with several: its text goes on below the second one."""


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Handler of the log on the console; configs/launcher.yaml names it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record as they are shown."""
        return wrapped(super().format(record), self.stream)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, a method of logging.Handler
        """Continue without a console if its reader has closed the pipe, as head does; the log file has every line."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def wrapped(text: str, stream: TextIO) -> str:
    """Return a text; if the stream is a terminal, prose is wrapped at its width and commands stay on one line."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    lines = text.expandtabs().splitlines()
    return "\n".join(line if COMMAND.search(line) else _fill(line, width=width) for line in lines)


def _fill(line: str, *, width: int) -> str:
    if len(line) <= width:
        return line
    column = SECOND_COLUMN.match(line)
    indent = " " * (column.end() if column else len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
