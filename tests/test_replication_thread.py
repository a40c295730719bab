"""Records reach a store that fails temporarily, in order and once; those for a store that fails permanently stay on disk."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prostate_seg.tracking import replication
from prostate_seg.tracking.journal import Header, Journal, pending_journals
from prostate_seg.tracking.records import LogData
from prostate_seg.tracking.replication import ReplicationThread
from tests.project_helpers import until

ADDRESS = "http://store"


class FakeStore:
    """Accepts records by number, from 0; refuses each `refusals` times, and responds only while `answers` is set."""

    def __init__(self, journal: Journal, *, refusals: dict[int, int] | None = None, seconds: float = 0.0) -> None:
        self.journal = journal
        self.refusals = refusals or {}
        self.seconds = seconds
        self.taken: list[int] = []
        self.heartbeats = 0
        self.answers = threading.Event()
        self.answers.set()

    def replicate(self) -> None:
        for number, record in self.journal.unacknowledged():
            self.answers.wait(60)
            time.sleep(self.seconds)
            assert isinstance(record, LogData)
            name = int(record.tags["number"])
            if self.refusals.get(name, 0) > 0:
                self.refusals[name] -= 1
                raise ConnectionError(f"refused {name}")
            self.taken.append(name)
            self.journal.acknowledge(number)

    def heartbeat(self, _key: str) -> None:
        self.heartbeats += 1


def start(store: Any) -> ReplicationThread:
    return ReplicationThread(store, "r")


def append(journal: Journal, numbers: range) -> None:
    for number in numbers:
        journal.append(LogData(run="r", tags={"number": str(number)}))


def replication_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlflow replication"]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    one = Journal.create(tmp_path, Header(what="train of p", address=ADDRESS, experiment="e"), name="train")
    yield one
    until(lambda: not replication_threads(), 10)
    one.release()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Retry at once, and capture the log."""
    caplog.set_level(logging.INFO, logger="prostate_seg")
    monkeypatch.setattr(replication, "SECONDS_BETWEEN_TRIES", 0.01)


def test_store_that_fails_for_a_while_gets_every_record_in_order_and_once(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore(journal, refusals={0: 3, 4: 1, 9: 2})
    thread = start(store)
    append(journal, range(10))
    assert thread.close(within_seconds=30) == 0
    assert store.taken == list(range(10))
    failed, again = "the tracking store http://store fails: refused {}; what", "answers again"
    messages = [record.getMessage() for record in caplog.records]
    assert [text.startswith(failed.format(number)) for text, number in zip(messages[::2], (0, 4, 9), strict=True)] == [
        True
    ] * 3
    assert [again in text for text in messages] == [False, True] * 3


def test_store_that_recovers_after_the_end_of_the_stage_still_gets_everything(journal: Journal) -> None:
    store = FakeStore(journal, refusals={0: 10**9})
    thread = start(store)
    append(journal, range(3))
    until(lambda: store.refusals[0] < 10**9 - 2, 10)
    threading.Timer(0.05, store.refusals.clear).start()
    assert thread.close(within_seconds=30) == 0
    assert store.taken == [0, 1, 2]


def test_records_that_a_store_never_takes_are_on_disk_with_one_warning(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore(journal, refusals=dict.fromkeys(range(1, 5), 10**9))
    thread = start(store)
    append(journal, range(5))
    began = time.monotonic()
    assert thread.close(within_seconds=0.1) == 4
    assert time.monotonic() - began < 5
    assert store.taken == [0]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == f"the tracking store http://store fails: refused 1; what it misses is kept in {journal.folder}"
    journal.release()
    assert [found.num_records for found in pending_journals(journal.folder.parent)] == [4]


def test_close_does_not_wait_for_a_store_that_has_failed_for_long(journal: Journal) -> None:
    store = FakeStore(journal, refusals={0: 10**9})
    append(journal, range(3))
    thread = start(store)
    began = time.monotonic()
    assert thread.close(within_seconds=30) == 3
    assert time.monotonic() - began < 5


def test_store_that_hangs_delays_neither_training_nor_its_end(journal: Journal) -> None:
    store = FakeStore(journal)
    store.answers.clear()
    thread = start(store)
    began = time.monotonic()
    append(journal, range(1000))
    assert thread.close(within_seconds=0.1) == 1000
    assert time.monotonic() - began < 10  # the store would hang for a minute
    assert store.taken == []
    assert len(list(journal.records())) == 1000
    store.answers.set()


def test_close_waits_for_a_slow_store_that_acknowledges_records(journal: Journal) -> None:
    store = FakeStore(journal, seconds=0.1)
    thread = start(store)
    append(journal, range(8))
    assert thread.close(within_seconds=0.4) == 0


def test_stage_that_reports_nothing_sends_heartbeats(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replication, "HEARTBEAT_SECONDS", 0.01)
    store = FakeStore(journal)
    thread = start(store)
    until(lambda: store.heartbeats >= 3, 10)
    assert thread.close(within_seconds=30) == 0


def test_failing_heartbeat_does_not_block_records(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replication, "HEARTBEAT_SECONDS", 0.01)
    store = FakeStore(journal)

    def fail(_key: str) -> None:
        store.heartbeats += 1
        raise ConnectionError("refused")

    monkeypatch.setattr(store, "heartbeat", fail)
    thread = start(store)
    until(lambda: store.heartbeats >= 3, 10)
    append(journal, range(3))
    assert thread.close(within_seconds=30) == 0
    assert store.taken == [0, 1, 2]
    assert caplog.records[0].getMessage() == "the tracking store http://store fails: refused"
