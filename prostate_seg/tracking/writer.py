"""Tells the store what a stage reports from a thread of its own: training never waits for the store, nor stops when it fails.

What is reported is on disk before it is sent. What cannot be sent is tried again, in order, until it goes through or the stage
has ended; the rest stays on disk, for stage=sync.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from prostate_seg.common.address import shown_address
from prostate_seg.common.errors import InputError
from prostate_seg.operations.process import HEARTBEAT_SECONDS
from prostate_seg.tracking.journal import Record, Spool, as_one
from prostate_seg.tracking.store import STORE_ERRORS

log = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = 2.0
BYTES_PER_SECOND = 2**20
"""A slower upload of files counts as one that hangs, once the stage has ended."""

Deliver = Callable[[int, Record], object]


class Writer:
    """One thread per stage: what it and its folds report, in order, and the stage's heartbeat."""

    def __init__(self, spool: Spool, deliver: Deliver, *, beat: Callable[[], object], is_failing: bool = False) -> None:
        """Start the thread, with what the spool holds to begin with.

        Args:
            spool: Keeps every record until it has been sent.
            deliver: Sends a record, by its number; raises while the store fails.
            beat: Gives a sign of life.
            is_failing: Whether the store could not be reached just now, which has been said.
        """
        self._spool = spool
        self._deliver = deliver
        self._beat_once = beat
        self._waiting: queue.Queue[tuple[int, Record] | None] = queue.Queue()
        self._order = threading.Lock()
        self._give_up_after: float | None = None
        self._failing_since: float | None = 0.0 if is_failing else None
        self._num_sent = spool.num_delivered
        for number, record in spool.records():
            if number > spool.num_delivered:
                self._waiting.put((number, record))
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow writer")
        self._thread.start()

    def put(self, record: Record) -> None:
        """Take a record; returns at once."""
        with self._order:
            self._waiting.put((self._spool.put(record), record))

    def close(self, *, within_seconds: float) -> int:
        """Send what is left and stop; return the number of records that did not go through.

        Args:
            within_seconds: How long a store may have failed, or take for one record; files may take longer.
        """
        self._give_up_after = within_seconds
        self._waiting.put(None)
        sent, until = -1, 0.0
        while self._thread.is_alive() and (self._num_sent != sent or time.monotonic() < until):
            if self._num_sent != sent:
                upload = self._spool.files_size() / BYTES_PER_SECOND
                sent, until = self._num_sent, time.monotonic() + within_seconds + SECONDS_BETWEEN_TRIES + upload
            self._thread.join(0.05)
        self._spool.flush()
        return self._spool.num_records - self._num_sent

    def _work(self) -> None:
        next_beat = time.monotonic() + HEARTBEAT_SECONDS
        while True:
            try:
                first = self._waiting.get(timeout=max(0.0, next_beat - time.monotonic()))
            except queue.Empty:
                self._beat()
                next_beat = time.monotonic() + HEARTBEAT_SECONDS
                continue
            waiting = [first, *self._all_that_wait()]
            records = as_one(one for one in waiting if one is not None)
            if not all(self._insist(number, record) for number, record in records) or None in waiting:
                return

    def _all_that_wait(self) -> list[tuple[int, Record] | None]:
        """Take what has gathered, so that a store that is slower than the training gets more in a call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._waiting.get_nowait())
        return found

    def _insist(self, number: int, record: Record) -> bool:
        """Send a record; return whether it went through before the stage had ended."""
        while True:
            try:
                self._deliver(number, record)
            except (*STORE_ERRORS, InputError) as error:
                self._say(f"{_first_line(error)}; what it misses is kept in {self._spool.folder}")
                self._spool.flush()
                if self._is_to_give_up():
                    return False
                time.sleep(SECONDS_BETWEEN_TRIES)
            else:
                if self._failing_since is not None:
                    log.info("the tracking store %s answers again", self._spool.header.address)
                self._failing_since = None
                self._num_sent = number
                return True

    def _is_to_give_up(self) -> bool:
        """Return whether the stage has ended and the store has failed for long enough."""
        failing = time.monotonic() - (self._failing_since or 0.0)
        return self._give_up_after is not None and failing > self._give_up_after

    def _beat(self) -> None:
        try:
            self._beat_once()
        except STORE_ERRORS as error:
            self._say(_first_line(error))

    def _say(self, text: str) -> None:
        """Warn once per failure, not once per try."""
        if self._failing_since is None:
            log.warning("the tracking store %s fails: %s", self._spool.header.address, text)
            self._failing_since = time.monotonic()


def _first_line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shown_address(first)
