"""Progress bars at a terminal; plain lines in a log, a pipe or a dumb terminal; and completion in the shell."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fork_server import ForkedProcess
from tests.project_helpers import LAUNCHER, SMALL, Project, clean_environment

pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")

CONTROL = re.compile(r"\x1b|\r(?!\n)")
"""Escape sequences of cursor and colour."""

FETCH = ["stage=fetch", "mlflow=off"]


def at_terminal(folder: Path, kind: str) -> str:
    """Run a stage at a terminal of this type, 40 columns wide, and return its output."""
    ours, theirs = pty.openpty()
    environment = clean_environment() | {"TERM": kind, "COLUMNS": "40"}
    process = ForkedProcess(LAUNCHER, [*FETCH, *SMALL], folder=folder, environment=environment, files=(theirs, theirs))
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # end of a terminal on Linux
        while part := os.read(ours, 65536):
            text += part
    os.close(ours)
    assert process.wait(60) == 0, text
    return text.decode()


def test_terminal_shows_a_bar_and_a_dumb_terminal_lines(tmp_path: Path) -> None:
    assert CONTROL.search(at_terminal(tmp_path, "xterm"))
    text = at_terminal(tmp_path, "dumb")
    assert not CONTROL.search(text)
    assert "made 4 phantom studies" in text
    assert all(len(line) <= 40 or " " not in line.strip() for line in text.splitlines())


def test_pipe_and_log_have_plain_lines(tmp_path: Path) -> None:
    piped, _ = Project(tmp_path).start(*FETCH).communicate(timeout=60)
    (log,) = tmp_path.glob("logs/*/*/prostate_seg.log")
    for text in (piped, log.read_text(encoding="utf-8")):
        assert not CONTROL.search(text)
    assert "made 4 phantom studies" in piped
    assert max(map(len, piped.splitlines())) > 40


def test_help_ends_quietly_if_its_reader_has_left(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "prostate_seg", "--help"],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert done.stderr == b""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is absent")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("prostate-seg stage=train model=un", {"model=unet", "model=unet3d"}),
        ("prostate-seg stage=train train.max_", {"train.max_epochs=", "train.max_minutes="}),
    ],
)
def test_bash_completes_options_and_settings(tmp_path: Path, typed: str, offered: set[str]) -> None:
    script = f"""
    eval "$(prostate-seg -sc install=bash)"
    COMP_LINE={typed!r} COMP_POINT={len(typed)} COMP_CWORD=2
    hydra_bash_completion
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=clean_environment() | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == offered
    assert list(tmp_path.iterdir()) == []
