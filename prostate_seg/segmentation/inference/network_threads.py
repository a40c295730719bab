"""Threads for forward passes, each with a single thread of torch's own.

How torch splits a sum, and so the last bits of it, depends on the number of its threads. Here the caller splits the work into
batches of a fixed size, and the number of threads decides only how many batches run at once.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def network_threads(num_threads: int) -> ThreadPoolExecutor:
    """Return the pool of this size, one per process, so that studies side by side start no further threads."""
    with _lock:
        if num_threads not in _pools:
            # torch.set_num_threads applies to the calling thread, and to threads that use torch for the first time
            # afterwards. So all threads of the pool start here, before the number for later threads is restored.
            before = torch.get_num_threads()
            pool = ThreadPoolExecutor(num_threads, "network", initializer=_use_one_thread)
            all_started = threading.Barrier(num_threads + 1)
            for _ in range(num_threads):
                pool.submit(all_started.wait)
            all_started.wait()
            torch.set_num_threads(before)
            _pools[num_threads] = pool
        return _pools[num_threads]


def _use_one_thread() -> None:
    torch.get_num_threads()  # the first use of torch in a thread sets its number of threads; later calls override it
    torch.set_num_threads(1)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread within the calling thread, for short operations beside a forward pass."""
    torch.get_num_threads()  # as above
    with _controller().limit(limits=1, user_api="openmp"):  # torch.set_num_threads would affect other threads too
        yield


@cache
def _controller() -> ThreadpoolController:
    """Return the controller of the libraries' threads; a search for the libraries takes 10 ms."""
    return ThreadpoolController()
