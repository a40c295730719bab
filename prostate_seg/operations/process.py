"""Which process a run belongs to, and whether that process still lives.

A process id alone is not enough: ids are used again, machines restart, containers count from 1. Host, boot, process-id
namespace and the start of the process together are.
"""

import getpass
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

HEARTBEAT_SECONDS = 30.0
"""Time between two signs of life of a running stage."""
SILENT_AFTER = timedelta(minutes=5)
"""A process that cannot be looked up counts as ended after this long without a sign of life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process that keeps a run open."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: str
    process_started: str
    """Seconds since 1970, to 1/100."""

    def as_tags(self) -> dict[str, str]:
        """Return the run's tags that name this process, with a first heartbeat."""
        return {f"process.{name}": value for name, value in asdict(self).items()} | {"process.heartbeat": now_text()}


def this_process() -> Owner:
    """Return the identity of this process."""
    started = psutil.Process().create_time()
    return Owner(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=str(os.getpid()),
        process_started=f"{started:.2f}",
    )


def is_alive(tags: Mapping[str, str], *, now: datetime | None = None) -> bool | None:
    """Say whether the process that a run's tags name still lives.

    Args:
        tags: Tags of the run, with the process.* that `Owner.as_tags` gives.
        now: The time; the present when absent.

    Returns:
        None for a process of another host, which cannot be known from here.
    """
    if tags.get("process.host") != socket.gethostname():
        return None
    here = tags.get("process.boot_id") == _boot_id() and tags.get("process.pid_namespace") == _pid_namespace()
    if not here:  # the machine has restarted since, or a container with the same name runs elsewhere
        return not is_silent(tags, since=SILENT_AFTER, now=now)
    try:
        process = psutil.Process(int(tags["process.pid"]))
        same = abs(process.create_time() - float(tags["process.process_started"])) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False


def is_silent(tags: Mapping[str, str], *, since: timedelta, now: datetime | None = None) -> bool:
    """Return whether the last heartbeat is longer ago than `since`."""
    beat = tags.get("process.heartbeat", "1970-01-01T00:00:00+00:00")
    return (now or datetime.now(UTC)) - datetime.fromisoformat(beat) > since


def now_text() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def user_name() -> str:
    """Return who runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container whose user has no name; Windows without USERNAME
        return "unknown"


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else f"boot at {round(psutil.boot_time() / 10)}"


def _pid_namespace() -> str:
    try:
        return re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))  # noqa: PTH115 - not a path, pid:[4026531836]
    except OSError:
        return "none"
