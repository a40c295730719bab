"""Text tables: with a rule under the header at a terminal, plain aligned lines in a log. Nothing here prints."""

import io
import shutil
import sys
from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 1000
"""Line width in a log, where programs read line by line and rows must not wrap."""


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Collection[str] = ()) -> list[str]:
    """Return the lines of a table, without colours; `numbers` names the right-aligned columns.

    If standard output is a terminal, lines wrap at its width.
    """
    at_terminal = sys.stdout.isatty()
    has_rules = at_terminal and (sys.stdout.encoding or "").lower().startswith("utf")
    table = Table(box=box.SIMPLE_HEAD if has_rules else None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = shutil.get_terminal_size().columns if at_terminal else WIDEST
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, force_terminal=False, highlight=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
