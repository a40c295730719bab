"""Threads that run networks, each with one thread of torch's own.

How torch's libraries divide a sum depends on the number of their threads, and so do the last bits of it. Here the division
is the caller's: it submits inputs in batches of a fixed size, and the number of threads decides only how many run at once.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def network_threads(num_threads: int) -> ThreadPoolExecutor:
    """Return the pool of this many threads, one for the whole process, so that studies side by side start no more."""
    with _lock:
        if num_threads not in _pools:
            _pools[num_threads] = _start(num_threads)
        return _pools[num_threads]


def _start(num_threads: int) -> ThreadPoolExecutor:
    # torch.set_num_threads holds for the calling thread, and for threads that use torch for the first time afterwards. All
    # threads of the pool are therefore started here, before the number for later threads is set back.
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, "network", initializer=_use_one_thread)
    all_started = threading.Barrier(num_threads + 1)
    for _ in range(num_threads):
        pool.submit(all_started.wait)
    all_started.wait()
    torch.set_num_threads(before)
    return pool


def _use_one_thread() -> None:
    torch.get_num_threads()  # a thread's first use of torch, which would set the number of all threads in it
    torch.set_num_threads(1)
