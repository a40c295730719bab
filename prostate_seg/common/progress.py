"""Parallel work on many cases, with a progress bar at a terminal or plain lines in a log."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from threadpoolctl import threadpool_limits

from prostate_seg.common.signals import submit_all

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""Interval of progress lines in a log."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_cases(
    function: Callable[[Item], Result], cases: Sequence[Item], *, num_workers: int | None, label: str
) -> list[Result]:
    """Apply a function to every case, in threads, and return the results in order.

    Threads are enough because SimpleITK, NumPy and torch release the GIL. BLAS uses one thread per case meanwhile: nested
    threads would wait for each other, and the number of threads could change the rounding of sums.
    """
    workers = max(1, min(num_workers or num_cores(), len(cases)))
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(max_workers=workers) as pool,
        progress(label, total=len(cases)) as advance,
    ):
        try:
            futures = submit_all(pool, function, cases)
            for future in futures:
                future.add_done_callback(lambda _: advance())
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def progress(label: str, *, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Yield a function to call after each finished item, or with the numbers of finished and of all items once known."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    at_terminal = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    done, last_line = 0, time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not at_terminal) as bar:
        task = bar.add_task(label, total=total)

        def advance(now_done: int | None = None, now_total: int | None = None) -> None:
            nonlocal done, total, last_line
            done, total = done + 1 if now_done is None else now_done, now_total or total
            bar.update(task, completed=done, total=total)
            if not at_terminal and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                log.info("%s %d/%d", label, done, total)

        yield advance


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
