"""Run the launcher without fork and without POSIX calls that Windows lacks: other_platform.py ARGUMENTS.

The module level is also executed in processes that are spawned from this one.
"""

import multiprocessing
import os
import signal

LACKING = {
    os: (
        *("chown", "fchmod", "fchown", "fork", "forkpty", "getloadavg", "getpgid", "getpgrp", "getpriority", "killpg"),
        *(
            "lchown",
            "mkfifo",
            "mknod",
            "nice",
            "openpty",
            "posix_fadvise",
            "posix_fallocate",
            "pread",
            "preadv",
            "pwrite",
        ),
        *("pwritev", "sched_getaffinity", "setpriority", "setsid", "sync"),
    ),
    signal: ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGTSTP", "setitimer", "pthread_sigmask"),
}
for _module, _names in LACKING.items():
    for _name in _names:
        if hasattr(_module, _name):
            delattr(_module, _name)

from prostate_seg.__main__ import main  # noqa: E402 - with less than this system has

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    main()
