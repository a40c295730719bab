"""Process identity and liveness: which process a run belongs to, and whether it is alive.

A process id is not enough: ids are reused, machines restart, containers count from 1. A process is identified by host, boot,
process-id namespace, process id and start time.
"""

import getpass
import os
import re
import socket
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

HEARTBEAT_SECONDS = 30.0
SILENT_AFTER = timedelta(minutes=5)
"""A process that cannot be looked up counts as dead after this time without a heartbeat."""


def process_tags() -> dict[str, str]:
    """Return the tags that identify this process as the owner of a run, with a first heartbeat."""
    return {
        "process.host": socket.gethostname(),
        "process.boot_id": _boot_id(),
        "process.pid_namespace": _pid_namespace(),
        "process.pid": str(os.getpid()),
        "process.process_started": f"{psutil.Process().create_time():.2f}",  # seconds since 1970
        "process.heartbeat": now_text(),
    }


def is_alive(tags: Mapping[str, str], *, now: datetime | None = None) -> bool | None:
    """Return whether the process with these tags is alive; None for one of another host, which cannot be looked up."""
    if tags.get("process.host") != socket.gethostname():
        return None
    # another boot: the machine has restarted; another namespace: perhaps a container with the same name elsewhere
    if tags.get("process.boot_id") != _boot_id() or tags.get("process.pid_namespace") != _pid_namespace():
        return not is_silent(tags, since=SILENT_AFTER, now=now)
    try:
        process = psutil.Process(int(tags["process.pid"]))
        is_same = abs(process.create_time() - float(tags["process.process_started"])) < 1.0
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False


def is_silent(tags: Mapping[str, str], *, since: timedelta, now: datetime | None = None) -> bool:
    """Return whether the last heartbeat of a run is older than `since`."""
    beat = tags.get("process.heartbeat", "1970-01-01T00:00:00+00:00")
    return (now or datetime.now(UTC)) - datetime.fromisoformat(beat) > since


def now_text() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def user_name() -> str:
    """Return the user of this process."""
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
