"""Journal: write-ahead log on disk of the records that the tracking store has not acknowledged, one folder per stage.

    records.jsonl    a header line, then one record per line, in order
    delivered.jsonl  a line per acknowledged or refused record, with the id that the store gave to a run
    files/NUMBER/    files that belong to a record
    lock             held by the process that writes the journal, or replicates it

Both lists are append-only. A line that a crash has cut off counts as not written, so that a record may be sent again but is
never lost.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder
from prostate_seg.tracking.records import RECORD, LogData, Record, Strict

log = logging.getLogger(__name__)

RECORDS, ACKNOWLEDGED, FILES, LOCK = "records.jsonl", "delivered.jsonl", "files", "lock"
Entry = tuple[int, Record]
"""Number of a record, counted from 1, and the record."""


def new_local_id() -> str:
    """Return an id for a run to which no store has given one yet."""
    return f"local-{uuid.uuid4().hex}"


class Header(Strict):
    """First line of a journal."""

    format: Literal[1] = 1
    what: str
    """Description for people, such as "train of baseline"."""
    address: str
    """Store that the records are for, without user and password."""
    experiment: str
    workspace: str = ""
    """Folder whose DS_VERSION.json names the run; empty where there is none."""
    cache: str = ""
    """Folder with the lock of that file."""


class Acknowledgement(Strict):
    """A record that the store has taken, or will never take."""

    record: int
    ids: dict[str, str] = Field(default_factory=dict)
    refused: str | None = None


class Journal:
    """One journal folder, locked by this process. Any thread may append and acknowledge."""

    def __init__(self, folder: Path, *, wait_seconds: float = 0) -> None:
        """Lock and read an existing journal.

        Raises:
            Timeout: If another process holds it for longer than `wait_seconds`.
            InputError: If it has another format.
        """
        self.folder = folder
        self._lock = FileLock(folder / LOCK, timeout=wait_seconds)
        self._lock.acquire()
        self._records = _JsonLines(folder / RECORDS)
        self._acknowledgements = _JsonLines(folder / ACKNOWLEDGED)
        self._mutex = threading.Lock()
        self._is_open = True
        self.changed = threading.Event()
        """Set by each append; the replication thread waits for it."""
        self.ids: dict[str, str] = {}
        """Ids of runs in the store, by local id."""
        self.num_acknowledged = 0
        self.num_refused = 0
        try:
            header, *records = read_lines(folder / RECORDS) or [{}]
            self.header = Header.model_validate(header)
            self._unacknowledged = list(enumerate(map(RECORD.validate_python, records), start=1))
            self.num_records = len(self._unacknowledged)
            for line in read_lines(folder / ACKNOWLEDGED):
                self._apply(Acknowledgement.model_validate(line))
        except ValidationError as error:
            self.release()
            raise InputError(f"{folder}: is not what a stage writes; move the folder away") from error

    @classmethod
    def create(cls, root: Path, header: Header, *, name: str) -> "Journal":
        """Create a journal in a new folder whose name sorts by time.

        Raises:
            InputError: If it cannot be created.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        folder = root / f"{stamp}_{re.sub(r'[^A-Za-z0-9]', '_', name)}_{uuid.uuid4().hex[:6]}"
        try:
            with atomic_folder(folder) as fresh:
                (fresh / RECORDS).write_text(header.model_dump_json() + "\n", encoding="utf-8", newline="\n")
            return cls(folder, wait_seconds=10)
        except OSError as error:
            raise InputError(
                f"{root} cannot be written: {error.strerror}\nFree some space, or set paths.journal to another folder."
            ) from error

    def append(self, record: Record) -> int:
        """Append a record and return its number; one that a full disk refuses is written with the next one."""
        with self._mutex:
            self.num_records += 1
            self._unacknowledged.append((self.num_records, record))
            try:
                self._records.append(record.model_dump_json(by_alias=True).encode())
            except OSError as error:
                log.warning("%s: %s; the record is kept in memory", self.folder, error.strerror)
            self.changed.set()
            return self.num_records

    def acknowledge(self, number: int, *, ids: Mapping[str, str] | None = None, refused: str | None = None) -> None:
        """Note that the store has taken all records up to this one, or why it never takes this one."""
        line = Acknowledgement(record=number, ids=dict(ids or {}), refused=refused)
        with self._mutex:
            self._apply(line)
            if self._is_open:
                with contextlib.suppress(OSError):  # the record is then sent again, which changes nothing
                    self._acknowledgements.append(line.model_dump_json(exclude_defaults=True).encode())

    def unacknowledged(self) -> list[Entry]:
        """Return the entries that the store has still to take, in order."""
        with self._mutex:
            return list(self._unacknowledged)

    def records(self) -> list[Record]:
        """Return all records on disk, acknowledged or not."""
        return [RECORD.validate_python(line) for line in read_lines(self.folder / RECORDS)[1:]]

    def files_folder(self) -> Path:
        """Return an empty folder for the files of a record."""
        (self.folder / FILES).mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="", dir=self.folder / FILES))

    def files_size(self) -> int:
        """Return the bytes of the files that wait; files that are sent meanwhile may be among them."""
        size = 0
        for folder, _, names in os.walk(self.folder / FILES):
            with contextlib.suppress(OSError):
                size += sum(Path(folder, name).stat().st_size for name in names)
        return size

    def flush(self) -> bool:
        """Protect all records against a power cut; return whether all of them are on disk."""
        try:
            with self._mutex:
                if self._is_open:
                    self._records.flush()
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Release the lock of the folder."""
        with self._mutex:  # the replication thread may outlive the stage by one attempt
            if self._is_open:
                self._is_open = False
                self._records.close()
                self._acknowledgements.close()
                self._lock.release()

    def remove(self) -> None:
        """Release and delete the folder."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _apply(self, line: Acknowledgement) -> None:
        self.num_acknowledged = max(self.num_acknowledged, line.record)
        self.num_refused += line.refused is not None
        self.ids |= line.ids
        num_left = self.num_records - self.num_acknowledged
        del self._unacknowledged[: max(0, len(self._unacknowledged) - num_left)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingJournal:
    """A journal with records that its store has not taken."""

    folder: Path
    what: str
    address: str
    num_records: int
    is_locked: bool
    """Whether a process still writes or replicates it."""


def journal_folders(root: Path) -> list[Path]:
    """Return the journals below a folder, oldest first."""
    return sorted(path.parent for path in root.glob(f"[!.]*/{RECORDS}"))


def pending_journals(root: Path) -> list[PendingJournal]:
    """Return the journals with records that are not acknowledged, or were refused."""
    found = []
    for folder in journal_folders(root):
        header, *records = read_lines(folder / RECORDS) or [{}]
        lines = read_lines(folder / ACKNOWLEDGED)
        num_acknowledged = max((int(line.get("record", 0)) for line in lines), default=0)
        num_left = max(0, len(records) - num_acknowledged) + sum("refused" in line for line in lines)
        if num_left:
            found.append(
                PendingJournal(
                    folder=folder,
                    what=str(header.get("what", "unreadable")),
                    address=str(header.get("address", "")),
                    num_records=num_left,
                    is_locked=_is_locked(folder),
                )
            )
    return found


def remove_replicated(root: Path) -> None:
    """Delete the journals of killed processes whose records have all been acknowledged."""
    pending = {found.folder for found in pending_journals(root)}
    for folder in journal_folders(root):
        has_records = len(read_lines(folder / RECORDS)) > 1  # a journal without records has only just begun
        if has_records and folder not in pending:
            with contextlib.suppress(Timeout, InputError, OSError):
                Journal(folder).remove()


def _is_locked(folder: Path) -> bool:
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete JSON lines of a file; none when there is no file."""
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def merge_metrics(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield entries with consecutive metrics of one run merged under the number of the last: one call instead of many."""

    def group(entry: Entry) -> object:
        number, record = entry
        return record.run if isinstance(record, LogData) and not record.params and not record.tags else number

    for _, group_entries in itertools.groupby(entries, key=group):
        merged = list(group_entries)
        number, last = merged[-1]
        if isinstance(last, LogData) and len(merged) > 1:
            points = (point for _, record in merged if isinstance(record, LogData) for point in record.metrics)
            last = last.model_copy(update={"metrics": tuple(points)})
        yield number, last


class _JsonLines:
    """Append-only file of JSON lines. What a full disk refuses is written before the next line."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a line that a crash has cut off
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def append(self, line: bytes) -> None:
        self._unwritten += line + b"\n"
        self._write()

    def flush(self) -> None:
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self) -> None:
        while self._unwritten:
            num_written = os.write(self._file.fileno(), self._unwritten)
            self._unwritten = self._unwritten[num_written:]
