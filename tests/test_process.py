"""A process is dead only if that is certain; one that can be alive is never dead."""

import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import psutil

from prostate_seg.operations.process import is_alive, is_silent, process_tags


def test_this_process_is_alive() -> None:
    assert is_alive(process_tags()) is True


def test_ended_process_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(child.pid).create_time()
    tags = process_tags() | {"process.pid": str(child.pid), "process.process_started": f"{started:.2f}"}
    assert is_alive(tags) is True
    child.communicate(b"\n")
    assert is_alive(tags) is False


def test_later_process_with_the_same_id_is_another_one() -> None:
    assert is_alive(process_tags() | {"process.process_started": "1.00"}) is False


def test_state_of_a_process_on_another_host_is_unknown() -> None:
    assert is_alive(process_tags() | {"process.host": "elsewhere"}) is None


def test_host_with_the_same_name_and_another_boot_id_is_alive_until_its_heartbeat_stops() -> None:
    tags = process_tags() | {"process.boot_id": "other"}
    assert tags["process.host"] == socket.gethostname()
    assert is_alive(tags) is True
    assert is_alive(tags, now=datetime.now(UTC) + timedelta(minutes=6)) is False


def test_run_without_a_heartbeat_is_silent() -> None:
    assert is_silent({}, since=timedelta(days=365))
