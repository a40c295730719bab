"""What Hydra knows of a job, how it may end, and what a stage sees of its run. No library is needed to say so."""

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Protocol

from prostate_seg.common.errors import Pruned
from prostate_seg.config.workspace import FoldRecord, StageResult, null_fold_record

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a process that Ctrl-C or SIGTERM ended."""
REQUEUED = (-1, 144)
"""Exit codes of a job that submitit has put back into the queue: on Slurm, and on this machine."""


class Outcome(Enum):
    """How a stage ended, in MLflow's words."""

    finished = "FINISHED"
    failed = "FAILED"
    killed = "KILLED"


def outcome_of(error: BaseException) -> Outcome:
    """Say what becomes of a run that this error ends: KILLED by a signal and a study's pruner, else FAILED."""
    is_signal = isinstance(error, SystemExit) and error.code in (INTERRUPTED, TERMINATED, *REQUEUED)
    return Outcome.killed if is_signal or isinstance(error, KeyboardInterrupt | Pruned) else Outcome.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job of a command line."""

    overrides: tuple[str, ...]
    """What the command line set."""
    output_dir: Path
    """Hydra's folder for the job, with its log."""
    hydra_dir: str
    """Name of the folder inside it with the config as composed."""
    sweep_folder: Path | None
    """Folder of the multirun that the job is part of; None for a single run."""
    number: int | None
    """Number of the job in it."""
    cluster_key: str | None = None
    """Names the job of a cluster, that may be stopped and started again; None elsewhere."""


class Recorded(Protocol):
    """The run as the launcher sees it."""

    @property
    def run_id(self) -> str | None:
        """Its id in the store; None where nothing is recorded there."""

    def open_fold(self, index: int) -> AbstractContextManager[FoldRecord]:
        """Record one fold of training."""

    def finish(self, result: StageResult) -> None:
        """Take what the stage read, wrote and measured."""

    def close(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """End the run, with what ended it early."""


class Unrecorded:
    """Stands for the run of a stage that only answers a question."""

    open_fold = staticmethod(null_fold_record)
    run_id = None

    def finish(self, result: StageResult) -> None:
        """Forget the result."""

    def close(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Do nothing."""


class Skipped(Unrecorded):
    """Stands for the run of a stage that has been run before and need not run again."""

    def __init__(self, result: StageResult) -> None:
        self.result = result


def terminate(_signal: int, _frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that every `finally` on the way out runs."""
    sys.exit(TERMINATED)


TYPED = "PROSTATE_SEG_TYPED"
"""Variable with the arguments as typed: sys.argv has them as Hydra reads them, and workers of a launcher have their own."""


def typed_arguments() -> list[str]:
    """Return the arguments of the launcher as typed."""
    return shlex.split(os.environ[TYPED]) if TYPED in os.environ else sys.argv[1:]


def command_line(job: Job | None = None) -> str:
    """Return how this process was started, as a person would type it; of a cluster's job, what it runs."""
    return _typed(job.overrides if job is not None and job.cluster_key is not None else typed_arguments())


NOT_OF_ONE_RUN = ("+sweep", "mlflow.skip_finished")
"""Settings that a sweep has and the training of its best setting has not."""


def command_of(overrides: Iterable[str], *, without: Sequence[str] = ()) -> str:
    """Return what to type to run one job of a sweep by itself.

    Args:
        overrides: Of the job.
        without: Settings to leave out.
    """
    left_out = (*NOT_OF_ONE_RUN, *without)
    kept = [word for word in overrides if word.split("=")[0] not in left_out]
    return _typed(sorted(kept, key=lambda word: not word.startswith("stage=")))


def _typed(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "prostate_seg", *arguments])
