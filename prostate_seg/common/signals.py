"""Ctrl-C and SIGTERM, held back where an exception between two steps would leave something behind."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block has ended; only the main thread is told of signals, and holds them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPPING}

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    for number in STOPPING:
        if callable(before[number]):
            signal.signal(number, hold)
    try:
        yield
    finally:
        for number in STOPPING:
            if callable(before[number]):
                signal.signal(number, before[number])
        for arrived in held:
            signal.raise_signal(arrived)


def submit_all(pool: Executor, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Future[Result]]:
    """Submit `function` of every item.

    A pool whose start of a thread is interrupted forgets the thread, and would not wait for it when it is shut down.
    """
    with signals_held():
        return [pool.submit(function, item) for item in items]
