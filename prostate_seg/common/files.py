"""Atomic writes and file hashes.

A reader sees the file from before or the file from after a write, never a part of one. Nothing here knows what it stores.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from prostate_seg.common.signals import signals_held

if TYPE_CHECKING:
    import pandas as pd

HOST = re.sub(r"\W", "", socket.gethostname())
"""Part of the names of unfinished files: process ids mean something on their own machine alone."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path with the target's suffixes; rename it to `target` when the block ends without an error."""
    with _own_folder(target.parent) as folder:
        temporary = folder / target.name
        yield temporary
        os.replace(temporary, target)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder; let it replace `target` as a whole when the block ends without an error."""
    with _own_folder(target.parent) as holder:
        fresh = holder / "new"
        fresh.mkdir()
        yield fresh
        replace_folder(fresh, target)


@contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """Make a folder for what is not complete yet, and remove it; those of killed processes go first, or they would count.

    Ctrl-C may come at any step: the name is known before the folder is there, and its removal is tried twice.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_left(parent)
    folder = parent / f".tmp-{HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _remove_left(parent: Path) -> None:
    """Remove what processes of this host that live no more have not completed; looked for once per process."""
    for left in parent.glob(f".tmp-{HOST}-*-*"):
        number = left.name.split("-")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def replace_folder(fresh: Path, target: Path) -> None:
    """Move `fresh` to `target`; what was there is moved aside first, put back on failure and removed on success."""
    with signals_held():  # Ctrl-C between two steps would lose what was there
        if not target.exists():
            os.replace(fresh, target)
            return
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
    """Write UTF-8 text atomically; lines end alike on every system, so that equal results have equal hashes."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(target: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused, because JSON has none."""
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
