"""What a store has still to be told, on disk: a folder for each stage, which is gone once the store has taken all of it.

    records.jsonl    a first line that says for whom, then a record a line, in order
    delivered.jsonl  a line for each record that the store has taken, or refused, with the id that it gave to a run
    files/NUMBER/    the files that belong to a record
    lock             held by the process that writes the folder, or sends it

The two lists are only ever appended to. A line that a crash has cut off counts as not written, so that a record may be sent
again but is never lost. Nothing here knows a store.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder

log = logging.getLogger(__name__)

FORMAT = 1
RECORDS, DELIVERED, FILES, LOCK = "records.jsonl", "delivered.jsonl", "files", "lock"
Record = Mapping[str, Any]


def new_local_id() -> str:
    """Return an id for a run that no store has given one yet."""
    return f"local-{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first line of a folder: whose records it holds, and for whom."""

    what: str
    """For people, such as "train of baseline"."""
    address: str
    """Of the store, without user and password."""
    experiment: str
    workspace: str = ""
    """Folder whose DS_VERSION.json names the run; empty where there is none."""
    cache: str = ""
    """Folder of the lock of that file."""


class Spool:
    """One folder, held by this process."""

    def __init__(self, folder: Path, *, wait_seconds: float = 0) -> None:
        """Take hold of a folder that is there.

        Args:
            folder: Of one stage.
            wait_seconds: How long to wait for a process that holds it.

        Raises:
            Timeout: If another process holds it.
            InputError: If it is not what this module writes.
        """
        self.folder = folder
        self._lock = FileLock(folder / LOCK, timeout=wait_seconds)
        self._lock.acquire()
        self._records = _Lines(folder / RECORDS)
        self._delivered = _Lines(folder / DELIVERED)
        self._writing = threading.Lock()
        self.ids: dict[str, str] = {}
        """The store's ids of runs, by local id."""
        self.num_delivered = 0
        self.num_refused = 0
        first, *_ = [*read_lines(folder / RECORDS), {}]
        try:
            values = dict(first)
            if values.pop("format") != FORMAT:
                raise KeyError("format")
            self.header = Header(**values)
        except (KeyError, TypeError) as error:
            self.release()
            raise InputError(f"{folder / RECORDS}: is not what a stage writes; move the folder away") from error
        self.num_records = len(list(self.records()))
        for line in read_lines(folder / DELIVERED):
            self._take_note(line)

    @classmethod
    def create(cls, root: Path, header: Header, *, name: str) -> "Spool":
        """Make a folder whose name sorts by time.

        Raises:
            InputError: If it cannot be made.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        folder = root / f"{stamp}_{re.sub(r'[^A-Za-z0-9]', '_', name)}_{uuid.uuid4().hex[:6]}"
        first = json.dumps({"format": FORMAT, **asdict(header)}, ensure_ascii=False)
        try:
            with atomic_folder(folder) as fresh:
                (fresh / RECORDS).write_text(f"{first}\n", encoding="utf-8")
            return cls(folder, wait_seconds=10)
        except OSError as error:
            raise InputError(
                f"{root} cannot be written: {error.strerror}\nFree some space, or set paths.spool to another folder."
            ) from error

    def put(self, record: Record) -> int:
        """Append a record and return its number; one that the disk does not take is written with the next that it takes."""
        with self._writing:
            self.num_records += 1
            try:
                self._records.append(record)
            except OSError as error:
                log.warning("%s: %s; the record is kept in memory", self.folder, error.strerror)
            return self.num_records

    def files_folder(self) -> Path:
        """Return an empty folder for the files of a record; in the system's own place where this disk is full."""
        try:
            (self.folder / FILES).mkdir(exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="", dir=self.folder / FILES))
        except OSError:
            return Path(tempfile.mkdtemp(prefix="prostate_seg-"))

    def files_size(self) -> int:
        """Return the bytes of the files that wait; those that are sent meanwhile may be among them."""
        size = 0
        for folder, _, names in os.walk(self.folder / FILES):
            with contextlib.suppress(OSError):
                size += sum(Path(folder, name).stat().st_size for name in names)
        return size

    def note(self, number: int, *, ids: Mapping[str, str] | None = None, refused: str | None = None) -> None:
        """Remember that the store has taken a record, or why it never will."""
        line = {"record": number} | ({"ids": dict(ids)} if ids else {}) | ({"refused": refused} if refused else {})
        self._take_note(line)
        with contextlib.suppress(OSError):  # it is then sent again, which does no harm
            self._delivered.append(line)

    def records(self) -> Iterator[tuple[int, Record]]:
        """Yield every record with its number."""
        yield from enumerate(list(read_lines(self.folder / RECORDS))[1:], start=1)

    def flush(self) -> bool:
        """Make what was put safe against a power cut; return whether all of it is on disk."""
        try:
            with self._writing:
                self._records.flush()
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Let go of the folder."""
        if self._lock.is_locked:
            self._records.close()
            self._delivered.close()
            self._lock.release()

    def remove(self) -> None:
        """Let go of the folder and delete it."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take_note(self, line: Mapping[str, Any]) -> None:
        self.num_delivered = max(self.num_delivered, int(line["record"]))
        self.num_refused += "refused" in line
        self.ids |= line.get("ids", {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A folder whose store lacks something."""

    folder: Path
    what: str
    address: str
    num_records: int
    is_held: bool
    """Whether a process still writes or sends it."""


def folders(root: Path) -> list[Path]:
    """Return the folders of a spool, oldest first."""
    return sorted(path.parent for path in root.glob(f"[!.]*/{RECORDS}"))


def waiting(root: Path) -> list[Waiting]:
    """Say what waits in a spool; a folder of which all has been delivered does not."""
    return [found for folder in folders(root) if (found := _look_at(folder)).num_records]


def remove_delivered(root: Path) -> None:
    """Delete the folders of killed processes whose store lacks nothing."""
    for folder in folders(root):
        has_records = len(list(read_lines(folder / RECORDS))) > 1  # without any, its process has only begun
        if has_records and not _look_at(folder).num_records:
            with contextlib.suppress(Timeout, InputError, OSError):
                Spool(folder).remove()


def is_held(folder: Path) -> bool:
    """Return whether a process writes or sends a folder."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the lines of a file that are whole; none when there is no file."""
    if path.is_file():
        for line in path.read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def plain(value: float) -> float | str:
    """Return a number that JSON has; NaN and infinity as words, which float() reads."""
    return float(value) if math.isfinite(value) else str(float(value))


def as_one(records: Iterable[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Yield records with the curves of a run that follow each other in one, under the number of the last."""
    waiting: tuple[int, dict[str, Any]] | None = None
    for number, record in records:
        is_curve = set(record) == {"do", "run", "metrics"}
        if waiting is not None and is_curve and record["run"] == waiting[1]["run"]:
            waiting = number, {**waiting[1], "metrics": [*waiting[1]["metrics"], *record["metrics"]]}
            continue
        if waiting is not None:
            yield waiting
        waiting = (number, dict(record)) if is_curve else None
        if waiting is None:
            yield number, record
    if waiting is not None:
        yield waiting


def _look_at(folder: Path) -> Waiting:
    first, *records = [*read_lines(folder / RECORDS)] or [{}]
    notes = list(read_lines(folder / DELIVERED))
    delivered = max((int(line["record"]) for line in notes), default=0)
    refused = sum("refused" in line for line in notes)
    return Waiting(
        folder=folder,
        what=str(first.get("what", "unreadable")),
        address=str(first.get("address", "")),
        num_records=max(0, len(records) - delivered) + refused,
        is_held=is_held(folder),
    )


class _Lines:
    """A file of JSON lines that is only appended to: a line is there as a whole, or not at all."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        self._file = path.open("r+b", buffering=0)
        self._size = self._file.read().rfind(b"\n") + 1
        self._file.truncate(self._size)  # what a crash has cut off
        self._waiting = b""

    def append(self, value: Mapping[str, Any]) -> None:
        self._waiting += json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._write()

    def flush(self) -> None:
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self) -> None:
        try:
            self._file.seek(self._size)
            left = memoryview(self._waiting)
            while left:
                left = left[_write_some(self._file, left) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(self._waiting)
        self._waiting = b""


def _write_some(file: FileIO, data: memoryview) -> int:
    """Write as much as the disk takes at once; return the number of bytes."""
    return file.write(data)
