"""A job of a command line: its overrides and folders, its outcome, and the interface of the run that may record it."""

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from prostate_seg.common.errors import Pruned
from prostate_seg.common.signals import TERMINATED
from prostate_seg.config.workspace import FoldRecord, StageResult, null_fold_record

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
REQUEUED = (-1, 144)
"""Exit codes of a job that submitit requeues: on Slurm, and on this machine."""


class Outcome(StrEnum):
    """Outcome of a stage, which is a status of MLflow."""

    finished = "FINISHED"
    failed = "FAILED"
    killed = "KILLED"


def outcome_of(error: BaseException) -> Outcome:
    """Return the outcome of a stage that ends with an error: killed by a signal or a pruner, else failed."""
    is_signal = isinstance(error, SystemExit) and error.code in (INTERRUPTED, TERMINATED, *REQUEUED)
    return Outcome.killed if is_signal or isinstance(error, KeyboardInterrupt | Pruned) else Outcome.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job of a command line."""

    overrides: tuple[str, ...]
    output_dir: Path
    """Hydra's output folder of the job, with its log."""
    hydra_dir: str
    """Name of the folder in it with the composed config."""
    sweep_folder: Path | None
    """Folder of the multirun; None for a single run."""
    number: int | None
    cluster_key: str | None = None
    """Key of a cluster job, which may be stopped and started again; None elsewhere."""


class NullRun:
    """Run of a job for the launcher; this one, of an untracked stage, records nothing."""

    @property
    def run_id(self) -> str | None:
        """Id of the run in the tracking store; None if nothing is recorded there."""
        return None

    def open_fold(self, index: int) -> AbstractContextManager[FoldRecord]:
        """Record the training of one fold."""
        return null_fold_record(index)

    def finish(self, result: StageResult) -> None:
        """Record what the stage read, wrote and measured."""

    def close(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Close the run, with the error that ended it."""


class SkippedRun(NullRun):
    """Run of a stage that is skipped, with the result of the earlier run."""

    def __init__(self, result: StageResult) -> None:
        self.result = result


TYPED = "PROSTATE_SEG_TYPED"
"""Variable with the arguments as typed; sys.argv has them as Hydra parses them, and worker processes have their own."""

NOT_OF_ONE_RUN = ("+sweep", "mlflow.skip_finished")
"""Settings of a sweep that a single job does not need."""


def typed_arguments() -> list[str]:
    """Return the arguments of the launcher as typed."""
    return shlex.split(os.environ[TYPED]) if TYPED in os.environ else sys.argv[1:]


def command_line(job: Job | None = None) -> str:
    """Return the command of this process as typed; for a cluster job the command of that job."""
    return _command(job.overrides if job is not None and job.cluster_key is not None else typed_arguments())


def command_of(overrides: Iterable[str], *, without: Sequence[str] = ()) -> str:
    """Return the command that runs one job of a sweep by itself, without the settings in `without`."""
    kept = [word for word in overrides if word.split("=")[0] not in (*NOT_OF_ONE_RUN, *without)]
    return _command(sorted(kept, key=lambda word: not word.startswith("stage=")))


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "prostate_seg", *arguments])
