"""A job of a cluster may be stopped at any moment and started again: by another process, on another machine.

SIGUSR1, SIGUSR2  the machine is wanted back, or the time is nearly over: submitit puts the job back into the queue
SIGTERM           Slurm ends the job, and alone knows whether it starts it again (preempted, requeued) or not (cancelled)

Either way the run is closed on the way out. The job that starts again opens it again, by the key that both have.
"""

import logging
import os
import signal
from pathlib import Path
from types import FrameType

from prostate_seg.common.files import md5_of_text
from prostate_seg.operations.job import terminate

log = logging.getLogger(__name__)


def is_cluster_job() -> bool:
    """Return whether submitit runs this process, and not one above it."""
    return "SUBMITIT_EXECUTOR" in os.environ and callable(signal.getsignal(_requeue_signal()))


def cluster_job_key(sweep_folder: Path, job_id: str) -> str:
    """Return a name of a job that is the same each time the cluster starts it."""
    return md5_of_text(f"{sweep_folder} {job_id}")


def heed_cluster_signals() -> None:
    """Let both signals requeue the job, and SIGTERM end it: submitit itself heeds one of them and ignores SIGTERM."""
    requeue = signal.getsignal(_requeue_signal())
    assert callable(requeue)

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # requeueing sends one, to this process and to submitit's scontrol
        log.warning("%s: the job goes back into the queue", signal.Signals(number).name)
        requeue(number, frame)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, leave)
    signal.signal(signal.SIGTERM, terminate)


def _requeue_signal() -> signal.Signals:
    """Return the one signal that submitit heeds."""
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
