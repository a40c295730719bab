"""Atomic writes: after a failure the previous file or folder is unchanged."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from prostate_seg.common import files
from prostate_seg.common.files import HOST, atomic_folder, atomic_path, md5_of, read_json, write_json, write_text


def test_failed_write_leaves_only_the_previous_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_failed_folder_write_leaves_only_the_previous_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        write_text(folder / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        write_text(folder / "b.txt", "half")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["a.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_new_folder_replaces_the_previous_one_completely(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        with atomic_folder(tmp_path / "out") as folder:
            write_text(folder / name, name)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_json_round_trip_keeps_letters_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, None]}


def test_md5_of_a_folder_depends_on_names_and_content(tmp_path: Path) -> None:
    write_text(tmp_path / "d" / "a", "abc")
    assert md5_of(tmp_path / "d" / "a") == "900150983cd24fb0d6963f7d28e17f72"
    first = md5_of(tmp_path / "d")
    write_text(tmp_path / "d" / "a", "abd")
    second = md5_of(tmp_path / "d")
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    assert len({first, second, md5_of(tmp_path / "d")}) == 3


@pytest.mark.parametrize(("number", "is_removed"), [(os.getppid(), False), (2**22 + 1, True)])
def test_next_write_removes_leftovers_of_a_killed_process(tmp_path: Path, number: int, is_removed: bool) -> None:
    left = tmp_path / f".tmp-{HOST}-{number}-abc" / "new"
    elsewhere = tmp_path / ".tmp-otherhost-4194305-abc"
    left.mkdir(parents=True)
    elsewhere.mkdir()
    write_text(tmp_path / "a.txt", "whole")
    assert left.exists() is not is_removed
    assert elsewhere.exists()


def interrupted_at(step: int, act: Callable[[], None]) -> bool:
    """Raise KeyboardInterrupt at the n-th line of this module and contextlib; return whether that line was reached."""
    left = step

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (files.__file__, contextlib.__file__):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


def test_interrupt_at_any_line_leaves_the_previous_or_the_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write(text: str) -> None:
        with atomic_folder(target) as folder:
            (folder / "a.txt").write_text(text)

    seen = set()
    step = 1
    write("old")
    while interrupted_at(step, lambda: write("new")):
        assert [path.name for path in tmp_path.iterdir()] == ["out"], step
        seen.add((target / "a.txt").read_text())
        shutil.rmtree(target)
        write("old")
        step += 1
    assert seen == {"old", "new"}
    assert step > 50
