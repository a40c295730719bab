"""Tables are plain aligned lines in a log and have a rule at a terminal; no cell is read as markup."""

import pytest

from prostate_seg.common.tables import table_lines

ROWS = [["a", "1.5"], ["[red]b", "10"]]


def test_in_a_log_columns_are_aligned_and_nothing_is_drawn() -> None:
    lines = table_lines(["case", "mL"], ROWS, numbers=["mL"])
    assert lines == ["case     mL", "a       1.5", "[red]b   10"]


def test_in_a_log_no_line_is_broken_however_long() -> None:
    (_, line) = table_lines(["case"], [["x" * 400]])
    assert line == "x" * 400


def test_at_a_terminal_headers_are_underlined_and_lines_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    lines = table_lines(["case", "mL"], [*ROWS, ["y" * 60, "2"]], numbers=["mL"])
    assert set(lines[1].strip()) <= {"─", " "}
    assert max(map(len, lines)) <= 30
    assert sum(line.count("y") for line in lines) == 60
    assert "\x1b" not in "".join(lines)
