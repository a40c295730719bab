"""Atomic writes, file hashes, and the guard against archive members outside of their folder ("zip slip").

A reader gets the old file or the new one, never a part of one.
"""

import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import psutil

from prostate_seg.common.signals import signals_held

if TYPE_CHECKING:
    import pandas as pd

HOST = re.sub(r"\W", "", socket.gethostname())
"""Part of the names of temporary folders: a process id is valid on its own machine only."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path with the target's suffixes; replace `target` with it if the block raises no error."""
    with _temporary_folder(target.parent) as folder:
        temporary = folder / target.name
        yield temporary
        _replace(temporary, target)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder; replace `target` with it if the block raises no error."""
    with atomic_path(target) as fresh:
        fresh.mkdir()
        yield fresh


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `parent`, and remove it at the end of the block, also after Ctrl-C at any step."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    folder = parent / f".tmp-{HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:  # again, if Ctrl-C interrupted the removal
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache  # once per process and folder
def _remove_abandoned(parent: Path) -> None:
    """Remove temporary folders left by dead processes of this host."""
    for folder in parent.glob(f".tmp-{HOST}-*-*"):
        pid = folder.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _replace(fresh: Path, target: Path) -> None:
    """Move `fresh` to `target`; an old folder is moved aside first, and restored on failure."""
    if not (fresh.is_dir() and target.exists()):
        os.replace(fresh, target)
        return
    with signals_held():  # Ctrl-C between two steps would lose the old folder
        aside = Path(tempfile.mkdtemp(prefix=".old-", dir=target.parent)) / target.name
        os.replace(target, aside)
        try:
            os.replace(fresh, target)
        except OSError:
            os.replace(aside, target)
            raise
        finally:
            shutil.rmtree(aside.parent, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text atomically, with the same line endings on every system, so that equal results have equal hashes."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(target: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity, which JSON lacks, raise ValueError."""
    write_text(target, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(target: Path, table: "pd.DataFrame", *, float_format: str | None = None) -> None:
    """Write a table atomically as CSV, without its index."""
    write_text(target, table.to_csv(index=False, float_format=float_format, lineterminator="\n"))


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def md5_of(path: Path) -> str:
    """Return the md5 of a file; of a folder, the md5 of its sorted relative names and file hashes."""
    if path.is_dir():
        parts = [f"{p.relative_to(path).as_posix()}:{md5_of(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
        return md5_of_text("\n".join(parts))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def md5_of_text(text: str) -> str:
    """Return the md5 of UTF-8 text."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def is_inside(name: str) -> bool:
    """Return whether an archive's member stays below the folder it is unpacked to, by its name, on any system."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not (path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name))
