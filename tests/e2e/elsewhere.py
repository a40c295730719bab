"""Run the launcher as on a system that forks no process and lacks what Windows lacks: elsewhere.py ARGUMENTS.

What is at the top holds in processes that are spawned from this one too.
"""

import multiprocessing
import os
import signal

LACKING = {
    os: ("fork", "forkpty", "killpg", "sched_getaffinity", "mkfifo", "setsid"),
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
