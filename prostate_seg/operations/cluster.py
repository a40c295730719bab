"""Signals of a cluster job, which may be stopped at any time and started again by another process on another machine.

SIGUSR1, SIGUSR2  preemption or end of the time limit: submitit requeues the job
SIGTERM           Slurm ends the job, with a requeue (preempted) or without (cancelled)

Either way the run is closed on the way out. A job that starts again reopens it by the key of the job.
"""

import logging
import os
import signal
from pathlib import Path
from types import FrameType

from prostate_seg.common.files import md5_of_text
from prostate_seg.common.signals import handle_stop_signals

log = logging.getLogger(__name__)


def is_cluster_job() -> bool:
    """Return whether submitit runs this process itself, not one above it."""
    return "SUBMITIT_EXECUTOR" in os.environ and callable(signal.getsignal(_requeue_signal()))


def cluster_job_key(sweep_folder: Path, job_id: str) -> str:
    """Return the key of a job, which is the same each time the cluster starts it."""
    return md5_of_text(f"{sweep_folder} {job_id}")


def handle_cluster_signals() -> None:
    """Let SIGUSR1 and SIGUSR2 requeue the job and SIGTERM end it; submitit handles one of them and ignores SIGTERM."""
    requeue = signal.getsignal(_requeue_signal())
    assert callable(requeue)

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends one, to this process and submitit's scontrol
        log.warning("%s: the job goes back into the queue", signal.Signals(number).name)
        requeue(number, frame)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, leave)
    handle_stop_signals()


def _requeue_signal() -> signal.Signals:
    """Return the signal that submitit handles."""
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
