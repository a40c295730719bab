"""Delay of Ctrl-C and SIGTERM during steps that an exception must not separate."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_held() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block. Python delivers signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: handler for number in STOPPING if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda arrived, _frame: held.append(arrived))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for arrived in held:
            signal.raise_signal(arrived)


def submit_all(pool: Executor, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Future[Result]]:
    """Submit `function` of every item.

    An interrupt during the start of a thread would make the pool lose the thread, and not wait for it at shutdown.
    """
    with signals_held():
        return [pool.submit(function, item) for item in items]
