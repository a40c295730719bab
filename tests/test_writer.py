"""Records reach a store that fails for a while, in order and once; one that fails for good keeps nobody waiting."""

import logging
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from prostate_seg.tracking import writer
from prostate_seg.tracking.writer import Writer
from tests.project_helpers import until


class FakeStore:
    """Takes numbers, but refuses each as often as it is told to, and answers only while it is not held."""

    address = "http://store"

    def __init__(self, *, refusals: dict[int, int] | None = None) -> None:
        self.refusals = refusals or {}
        self.taken: list[int] = []
        self.beats: list[str] = []
        self.answers = threading.Event()
        self.answers.set()
        self.client = SimpleNamespace(set_tag=lambda run_id, key, _: self.beats.append(f"{run_id} {key}"))

    def take(self, number: int) -> None:
        self.answers.wait(60)
        if self.refusals.get(number, 0) > 0:
            self.refusals[number] -= 1
            raise ConnectionError(f"refused {number}")
        self.taken.append(number)


def put(one: Writer, store: FakeStore, numbers: range) -> None:
    for number in numbers:
        one.put(lambda number=number: store.take(number))  # type: ignore[misc]


def writer_to(store: Any) -> Writer:
    return Writer(store, run_id="run")


def writer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlflow writer"]


@pytest.fixture(autouse=True)
def quick_and_ended(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Try again at once, keep what is said, and let every test end its thread."""
    caplog.set_level(logging.INFO, logger="prostate_seg")
    monkeypatch.setattr(writer, "SECONDS_BETWEEN_TRIES", 0.01)
    yield
    until(lambda: not writer_threads(), 10)


def test_store_that_fails_for_a_while_gets_every_record_in_order_and_once(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore(refusals={0: 3, 4: 1, 9: 2})
    one = writer_to(store)
    put(one, store, range(10))
    assert one.close(within_seconds=30) == 0
    assert store.taken == list(range(10))
    failed, again = "the tracking store http://store fails; what it misses is sent later: refused {}", "answers again"
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if again not in text] == [failed.format(number) for number in (0, 4, 9)]
    assert [again in text for text in said] == [False, True] * 3


def test_store_that_recovers_after_the_end_of_the_stage_still_gets_everything() -> None:
    store = FakeStore(refusals={0: 10**9})
    one = writer_to(store)
    put(one, store, range(3))
    until(lambda: store.refusals[0] < 10**9 - 2, 10)
    threading.Timer(0.05, store.refusals.clear).start()
    assert one.close(within_seconds=30) == 0
    assert store.taken == [0, 1, 2]


def test_store_that_never_recovers_is_given_up_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore(refusals=dict.fromkeys(range(1, 5), 10**9))
    one = writer_to(store)
    put(one, store, range(5))
    start = time.monotonic()
    assert one.close(within_seconds=0.1) == 4
    assert 0.1 <= time.monotonic() - start < 5
    assert store.taken == [0]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["the tracking store http://store fails; what it misses is sent later: refused 1"]


def test_store_that_hangs_blocks_neither_training_nor_its_end() -> None:
    store = FakeStore()
    store.answers.clear()
    one = writer_to(store)
    start = time.monotonic()
    put(one, store, range(1000))
    assert one.close(within_seconds=0.1) == 1000
    assert time.monotonic() - start < 10  # the store would hang for a minute
    assert store.taken == []
    store.answers.set()


def test_stage_that_reports_nothing_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "HEARTBEAT_SECONDS", 0.01)
    store = FakeStore()
    one = writer_to(store)
    until(lambda: len(store.beats) >= 3, 10)
    assert one.close(within_seconds=30) == 0
    assert set(store.beats) == {"run process.heartbeat"}


def test_failing_sign_of_life_stops_no_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "HEARTBEAT_SECONDS", 0.01)
    store = FakeStore()

    def fail(*_: str) -> None:
        store.beats.append("failed")
        raise ConnectionError("refused")

    store.client.set_tag = fail
    one = writer_to(store)
    until(lambda: len(store.beats) >= 3, 10)
    put(one, store, range(3))
    assert one.close(within_seconds=30) == 0
    assert store.taken == [0, 1, 2]
    assert caplog.records[0].getMessage() == "the tracking store http://store fails: refused"
