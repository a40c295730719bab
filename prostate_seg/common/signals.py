"""Ctrl-C and SIGTERM as exceptions: delayed during steps that must not be separated, and repeated where Python ignored them."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

STOPPING = (signal.SIGINT, signal.SIGTERM)
TERMINATED = 143
"""Exit code after SIGTERM."""
SECONDS_UNTIL_REPEATED = 0.05
"""Time for the callback to end in which an exception was ignored."""


def handle_stop_signals() -> None:
    """Turn SIGTERM into SystemExit, so that every `finally` block runs, and repeat it and Ctrl-C if Python ignores them.

    Python ignores exceptions in `__del__` and in callbacks of weak references, and a signal can arrive in one.
    """
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _repeat_ignored


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _repeat_ignored(unraisable: "sys.UnraisableHookArgs") -> None:
    """Deliver the signal again whose exception was ignored; every other ignored exception is printed, as usual."""
    error = unraisable.exc_value
    number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else None
    if isinstance(error, SystemExit) and error.code == TERMINATED:
        number = signal.SIGTERM
    if number is None:
        sys.__unraisablehook__(unraisable)
    else:
        timer = threading.Timer(SECONDS_UNTIL_REPEATED, _raise_in_main_thread, [number])
        timer.daemon = True
        timer.start()


def _raise_in_main_thread(number: int) -> None:
    if hasattr(signal, "pthread_kill") and (thread := threading.main_thread().ident) is not None:
        signal.pthread_kill(thread, number)  # interrupts what it waits for
    else:
        signal.raise_signal(number)


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
