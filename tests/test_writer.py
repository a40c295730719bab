"""Records reach a store that fails for a while, in order and once; what one that fails for good has missed is on disk."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prostate_seg.tracking import writer
from prostate_seg.tracking.journal import Header, Record, Spool, waiting
from prostate_seg.tracking.writer import Writer
from tests.project_helpers import until

ADDRESS = "http://store"


class FakeStore:
    """Takes numbers, but refuses each as often as it is told to, and answers only while it is not held."""

    def __init__(self, spool: Spool, *, refusals: dict[int, int] | None = None) -> None:
        self.spool = spool
        self.refusals = refusals or {}
        self.taken: list[int] = []
        self.beats = 0
        self.answers = threading.Event()
        self.answers.set()

    def take(self, number: int, record: Record) -> None:
        self.answers.wait(60)
        if self.refusals.get(record["number"], 0) > 0:
            self.refusals[record["number"]] -= 1
            raise ConnectionError(f"refused {record['number']}")
        self.taken.append(record["number"])
        self.spool.note(number)

    def beat(self) -> None:
        self.beats += 1


def put(one: Writer, numbers: range) -> None:
    for number in numbers:
        one.put({"do": "log", "number": number})


def writer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlflow writer"]


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    one = Spool.create(tmp_path, Header(what="train of p", address=ADDRESS, experiment="e"), name="train")
    yield one
    until(lambda: not writer_threads(), 10)
    one.release()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Try again at once, and keep what is said."""
    caplog.set_level(logging.INFO, logger="prostate_seg")
    monkeypatch.setattr(writer, "SECONDS_BETWEEN_TRIES", 0.01)


def test_store_that_fails_for_a_while_gets_every_record_in_order_and_once(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore(spool, refusals={0: 3, 4: 1, 9: 2})
    one = Writer(spool, store.take, beat=store.beat)
    put(one, range(10))
    assert one.close(within_seconds=30) == 0
    assert store.taken == list(range(10))
    failed, again = "the tracking store http://store fails: refused {}; what", "answers again"
    said = [record.getMessage() for record in caplog.records]
    assert [text.startswith(failed.format(number)) for text, number in zip(said[::2], (0, 4, 9), strict=True)] == [
        True
    ] * 3
    assert [again in text for text in said] == [False, True] * 3


def test_store_that_recovers_after_the_end_of_the_stage_still_gets_everything(spool: Spool) -> None:
    store = FakeStore(spool, refusals={0: 10**9})
    one = Writer(spool, store.take, beat=store.beat)
    put(one, range(3))
    until(lambda: store.refusals[0] < 10**9 - 2, 10)
    threading.Timer(0.05, store.refusals.clear).start()
    assert one.close(within_seconds=30) == 0
    assert store.taken == [0, 1, 2]


def test_what_a_store_that_never_recovers_has_missed_is_on_disk_and_said_once(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore(spool, refusals=dict.fromkeys(range(1, 5), 10**9))
    one = Writer(spool, store.take, beat=store.beat)
    put(one, range(5))
    start = time.monotonic()
    assert one.close(within_seconds=0.1) == 4
    assert time.monotonic() - start < 5
    assert store.taken == [0]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == f"the tracking store http://store fails: refused 1; what it misses is kept in {spool.folder}"
    spool.release()
    assert [found.num_records for found in waiting(spool.folder.parent)] == [4]


def test_store_that_has_failed_for_long_is_not_waited_for(spool: Spool) -> None:
    store = FakeStore(spool, refusals={0: 10**9})
    one = Writer(spool, store.take, beat=store.beat, is_failing=True)
    put(one, range(3))
    start = time.monotonic()
    assert one.close(within_seconds=30) == 3
    assert time.monotonic() - start < 5


def test_store_that_hangs_blocks_neither_training_nor_its_end(spool: Spool) -> None:
    store = FakeStore(spool)
    store.answers.clear()
    one = Writer(spool, store.take, beat=store.beat)
    start = time.monotonic()
    put(one, range(1000))
    assert one.close(within_seconds=0.1) == 1000
    assert time.monotonic() - start < 10  # the store would hang for a minute
    assert store.taken == []
    assert len(list(spool.records())) == 1000
    store.answers.set()


def test_slow_store_that_takes_one_record_after_the_other_is_waited_for(spool: Spool) -> None:
    store = FakeStore(spool)

    def slowly(number: int, record: Record) -> None:
        time.sleep(0.1)
        store.take(number, record)

    one = Writer(spool, slowly, beat=store.beat)
    put(one, range(8))
    assert one.close(within_seconds=0.4) == 0


def test_stage_that_reports_nothing_gives_signs_of_life(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "HEARTBEAT_SECONDS", 0.01)
    store = FakeStore(spool)
    one = Writer(spool, store.take, beat=store.beat)
    until(lambda: store.beats >= 3, 10)
    assert one.close(within_seconds=30) == 0


def test_failing_sign_of_life_stops_no_record(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "HEARTBEAT_SECONDS", 0.01)
    store = FakeStore(spool)

    def fail() -> None:
        store.beats += 1
        raise ConnectionError("refused")

    one = Writer(spool, store.take, beat=fail)
    until(lambda: store.beats >= 3, 10)
    put(one, range(3))
    assert one.close(within_seconds=30) == 0
    assert store.taken == [0, 1, 2]
    assert caplog.records[0].getMessage() == "the tracking store http://store fails: refused"
