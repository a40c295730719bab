"""Ctrl-C is delivered, but not within a protected block."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from prostate_seg.common.signals import signals_held, submit_all


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signal_within_the_block_is_delivered_after_it(number: signal.Signals, error: type[BaseException]) -> None:
    def stop(_number: int, _frame: object) -> None:
        raise error

    before = signal.signal(number, stop)
    ended = False
    try:
        with pytest.raises(error), signals_held():
            signal.raise_signal(number)
            ended = True
        assert ended
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


IGNORED = """
import signal, sys, threading
from prostate_seg.common.signals import handle_stop_signals

class Callback:
    def __del__(self):
        signal.raise_signal(signal.{name})  # Python ignores the exception of its handler here
        print("ignored", flush=True)

handle_stop_signals()
try:
    callback = Callback()
    del callback
    threading.Event().wait(20)
    print("lost")
finally:
    print("cleaned up")
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", -signal.SIGINT)])
def test_signal_whose_exception_python_ignored_is_delivered_again(name: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", IGNORED.format(name=name)], capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stderr
    assert done.stdout.split("\n")[-2] == "cleaned up"
    assert "lost" not in done.stdout
    assert "Exception ignored" not in done.stderr


def test_other_ignored_exceptions_are_printed() -> None:
    text = IGNORED.replace("signal.raise_signal(signal.{name})", "raise ValueError('own')").replace("20", "0.2")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "ValueError: own" in done.stderr


def test_error_of_the_block_is_raised_and_the_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="own"), signals_held():
        raise ValueError("own")
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_can_use_the_block() -> None:
    with ThreadPoolExecutor(1) as outer, ThreadPoolExecutor(2) as inner:
        futures: Future[list[Future[int]]] = outer.submit(submit_all, inner, abs, [-1, -2])
        assert [future.result() for future in futures.result()] == [1, 2]


def test_interrupted_pool_waits_for_all_of_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[threading.Thread] = []
    start = threading.Thread.start

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        threads.append(thread)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    pool = ThreadPoolExecutor(2)
    with pytest.raises(KeyboardInterrupt):
        submit_all(pool, time.sleep, [0.2, 0.2])
    pool.shutdown(cancel_futures=True)
    assert len(threads) == 2
    assert not any(thread.is_alive() for thread in threads)
