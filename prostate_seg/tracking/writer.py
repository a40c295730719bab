"""Sends records to the store from a thread of its own: training never waits for the store, nor stops when it fails.

What cannot be sent is kept in memory, in order, and tried again until it goes through or the stage has ended.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable

from prostate_seg.tracking.process import HEARTBEAT_SECONDS, now_text
from prostate_seg.tracking.store import STORE_ERRORS, Store

log = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = 2.0

Send = Callable[[], object]


class Writer:
    """One thread per stage: what its folds report, in order, and the stage's heartbeat."""

    def __init__(self, store: Store, *, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._waiting: queue.Queue[Send | None] = queue.Queue()
        self._give_up_at: float | None = None
        self._is_failing = False
        self._num_put = 0
        self._num_sent = 0
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow writer")
        self._thread.start()

    def put(self, send: Send) -> None:
        """Take one call to the store; returns at once."""
        self._num_put += 1
        self._waiting.put(send)

    def close(self, *, within_seconds: float) -> int:
        """Send what is left and stop; return the number of calls that did not go through."""
        self._give_up_at = time.monotonic() + within_seconds
        self._waiting.put(None)
        self._thread.join(within_seconds + SECONDS_BETWEEN_TRIES)
        return self._num_put - self._num_sent

    def _work(self) -> None:
        next_beat = time.monotonic() + HEARTBEAT_SECONDS
        while True:
            try:
                send = self._waiting.get(timeout=max(0.0, next_beat - time.monotonic()))
            except queue.Empty:
                self._beat()
                next_beat = time.monotonic() + HEARTBEAT_SECONDS
                continue
            if send is None:
                return
            self._insist(send)

    def _insist(self, send: Send) -> None:
        while True:
            try:
                send()
            except STORE_ERRORS as error:
                self._say(f"the tracking store {self._store.address} fails; what it misses is sent later: {error}")
                if self._give_up_at is not None and time.monotonic() > self._give_up_at:
                    return
                time.sleep(SECONDS_BETWEEN_TRIES)
            else:
                if self._is_failing:
                    log.info("the tracking store %s answers again", self._store.address)
                self._is_failing = False
                self._num_sent += 1
                return

    def _beat(self) -> None:
        try:
            self._store.client.set_tag(self._run_id, "process.heartbeat", now_text())
        except STORE_ERRORS as error:
            self._say(f"the tracking store {self._store.address} fails: {error}")

    def _say(self, text: str) -> None:
        """Warn once per failure, not once per try."""
        if not self._is_failing:
            log.warning("%s", text.splitlines()[0])
        self._is_failing = True
