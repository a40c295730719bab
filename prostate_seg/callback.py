"""Hydra callback: opens the run of a job before its stage starts, and closes it once Hydra has written its log.

Hydra turns an exception of a callback into a warning, so every failure in here leaves as SystemExit with a message. MLflow is
imported only when a stage starts.
"""

import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf

from prostate_seg.cli import leave, require_inputs, typed_word, write_error
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import write_text
from prostate_seg.common.signals import handle_stop_signals
from prostate_seg.config import schema as configuration
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace, workspace_of
from prostate_seg.operations.cluster import cluster_job_key, handle_cluster_signals, is_cluster_job
from prostate_seg.operations.job import (
    Job,
    NullRun,
    Outcome,
    SkippedRun,
    outcome_of,
    typed_arguments,
)
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.stages import STAGES, UNTRACKED_STAGES, require_stage
from prostate_seg.sweeping.cost_estimate import log_grid_estimate
from prostate_seg.sweeping.grid import job_error
from prostate_seg.sweeping.identity import (
    is_multirun,
    is_study,
    require_training,
    sweep_path,
    swept_settings,
    trial_number,
)
from prostate_seg.tracking import set_mlflow_defaults

log = logging.getLogger(__name__)

INPUT_GROUPS = frozenset({"audit", "data", "evaluate", "experiment", "mlflow", "paths", "predict", "register"})
"""Groups that decide what a stage reads: when they are swept, each job has its own inputs."""


class JobFailed(SystemExit):
    """The only job of a command failed; raised before Hydra prints the overrides in Python's notation."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error


class StageTask:
    """Base of Hydra's task function; owns the open run of the job and the lock of its workspace.

    Hydra passes the task function to `on_job_start`, which opens the run in it, and calls it afterwards.
    """

    run: NullRun | None = None
    workspace_lock: ExitStack | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open run and the lock: a launcher pickles the task for its workers and for a requeued job."""
        return {}

    def open_run(self) -> NullRun:
        """Return the open run.

        Raises:
            InputError: If no callback opened one, because the config in force has none.
        """
        if self.run is None:
            raise InputError(
                "this config has no tracking callback, and no run stays unrecorded\n"
                "Use the project's own config; to record nothing, mlflow=off."
            )
        return self.run

    def close(self, error: BaseException | None, *, replace_error: bool = False) -> None:
        """Close the run, if one is open, with the error that ended the job, and release the workspace lock.

        With `replace_error`, a failure of the closing itself exits.
        """
        run, self.run = self.run, None
        if run is not None:
            with _ignore_sigterm(), _exit_on_error(replace_error=replace_error):
                run.close(Outcome.finished if error is None else outcome_of(error), error)
        lock, self.workspace_lock = self.workspace_lock, None
        if lock is not None:
            lock.close()


class TrackingCallback(Callback):
    """Opens and closes the runs of jobs and of multiruns."""

    def __init__(self) -> None:
        self._is_multirun_accepted = False  # Hydra calls the end hook of a refused multirun, too
        self._task = StageTask()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a config or stage that cannot run before Hydra creates the folder of its log."""
        with _exit_on_error():
            HydraConfig.instance().set_config(config)  # for settings that refer to it
            _require_runnable(config, [config.stage])

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Create the pipeline run and, for a sweep, the sweep's run before any job starts."""
        with _exit_on_error():
            swept = swept_settings(config)
            _require_runnable(config, swept.get("stage", [config.stage]), swept=set(swept) - {"stage"})
            self._is_multirun_accepted = True
            cfg = _tracked(config)
            if cfg is None:
                return
            is_sweep = is_study(config.hydra) or bool(set(swept) - {"stage"})
            if cfg.mlflow.tracking_uri is not None:
                set_mlflow_defaults()
                from prostate_seg.tracking.sweeps import begin_multirun

                begin_multirun(cfg, sweep_path(config), is_sweep=is_sweep)
            if is_sweep and not is_study(config.hydra):  # a study logs its missing trials itself
                log_grid_estimate(cfg, swept, is_paired="PairSweeper" in config.hydra.sweeper._target_)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Close the sweep's run with the worst status of its trials, and log the command that trains the best setting."""
        if not self._is_multirun_accepted:
            return
        with _exit_on_error():
            cfg = _tracked(config)
            if cfg is None or cfg.mlflow.tracking_uri is None:
                return
            from prostate_seg.tracking.sweeps import end_multirun

            command = end_multirun(cfg, sweep_path(config), draw=_draw_sweep)
            if command is not None and not is_study(config.hydra):
                log.info("to train the best setting of this sweep:\n  %s", command)

    def on_job_start(self, config: DictConfig, *, task_function: TaskFunction, **_: Any) -> None:
        """Open the run of a stage."""
        task = getattr(task_function, "__self__", None)
        assert isinstance(task, StageTask)
        self._task = task
        if is_cluster_job():
            handle_cluster_signals()
        elif signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # a worker of a launcher, which main() never entered
            handle_stop_signals()
        with _exit_on_error():
            job, redactor = _job(config), _redactor(config)
            # Hydra wrote config and overrides as they were
            for path in (job.output_dir / job.hydra_dir).glob("*.yaml"):
                text = path.read_text(encoding="utf-8")
                if (clean := redactor.text(text)) != text:
                    write_text(path, clean)
            cfg = _parsed(config)
            if cfg is not None and cfg.stage in STAGES:
                from prostate_seg.operations.workspace_lock import lock_workspace  # imports asyncio

                workspace = workspace_of(cfg)
                task.workspace_lock = lock_workspace(cfg, workspace)
                task.run = _opened_run(cfg, workspace, job)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        is_completed = job_return.status is JobStatus.COMPLETED
        error = None if is_completed else job_error(job_return)
        with _ignore_sigterm():
            redactor = _redactor(config)
            job_return.overrides = [redactor.text(word) for word in job_return.overrides or ()]  # Hydra prints them
            self._task.close(error, replace_error=is_completed)
        if isinstance(error, SystemExit) and error.code in (0, None):
            sys.exit(1)  # a stage that leaves by sys.exit(0) has no result, which is no success
        if isinstance(error, Exception) and not is_multirun(config.hydra):
            raise JobFailed(error)


def _draw_sweep(folder: Path, rows: Sequence[tuple[Mapping[str, str], float]]) -> None:
    from prostate_seg.sweeping.figures import draw_sweep  # optuna, matplotlib; not every multirun is a sweep

    draw_sweep(folder, rows)


def _opened_run(cfg: Config, workspace: Workspace, job: Job) -> NullRun:
    """Return the open run of a job. Modules that import MLflow, and those that hash, are imported here."""
    set_mlflow_defaults()  # stages that look runs up import MLflow too
    if cfg.stage in UNTRACKED_STAGES:
        return NullRun()
    from prostate_seg.tracking.stage_run import StageRun, finished_before

    if cfg.mlflow.skip_finished and (done := finished_before(cfg, workspace, job)) is not None:
        return SkippedRun(done)
    if cfg.mlflow.tracking_uri is None:
        return StageRun(cfg, workspace, job)
    from prostate_seg.tracking.tracked_run import TrackedRun

    return TrackedRun(cfg, workspace, job)


def _parsed(config: DictConfig) -> Config | None:
    """Return the config; None for one that the stage itself is about to refuse."""
    try:
        return configuration.parse(config)
    except ConfigError:
        return None


def _tracked(config: DictConfig) -> Config | None:
    """Return the config of a multirun whose stage records a run; None for another."""
    cfg = _parsed(config)
    return None if cfg is None or cfg.stage in UNTRACKED_STAGES else cfg


def _require_runnable(config: DictConfig, stages: Sequence[str | None], *, swept: Iterable[str] = ()) -> None:
    """Check the config and the inputs of its stages, as far as they are known before they run; each job checks its own.

    Raises:
        ConfigError: If the config cannot be used or a stage does not exist.
        InputError: If an input of a stage does not exist.
    """
    for stage in stages:
        require_stage(stage)
    if is_multirun(config.hydra) and is_study(config.hydra):
        require_training(stages)
    groups = {re.split(r"[./]", key.lstrip("+"))[0] for key in swept}
    if groups & INPUT_GROUPS or ("fold" in groups and list(stages) != ["train"]):
        return
    try:
        cfg = configuration.parse(config)
    except ConfigError:
        if swept or "${hydra:" in OmegaConf.to_yaml(config.paths):
            return
        raise
    typed = list(map(_redactor(config).text, typed_arguments()))
    require_inputs([str(stage) for stage in stages], cfg, typed)


def _job(config: DictConfig) -> Job:
    number: int | None = None
    if is_multirun(config.hydra):
        is_trial = is_study(config.hydra)
        number = trial_number(config.hydra) if is_trial else OmegaConf.select(config.hydra, "job.num", default=None)
    return Job(
        overrides=tuple(map(typed_word, config.hydra.overrides.task)),
        output_dir=Path(config.hydra.runtime.output_dir),
        hydra_dir=config.hydra.output_subdir or ".hydra",
        sweep_folder=sweep_path(config) if is_multirun(config.hydra) else None,
        number=number,
        cluster_key=cluster_job_key(sweep_path(config), config.hydra.job.id) if is_cluster_job() else None,
    )


def _redactor(config: DictConfig) -> Redactor:
    settings: Any = OmegaConf.to_container(config, resolve=False)
    return Redactor(settings=settings)


@contextmanager
def _exit_on_error(*, replace_error: bool = True) -> Iterator[None]:
    """Turn an exception into an exit, which Hydra cannot swallow: code 2 for the command or config, else 1.

    The stage's own error that is propagating is not replaced without `replace_error`.
    """
    try:
        yield
    except (ConfigError, HydraException) as error:
        leave(error)
    except Exception as error:
        if not isinstance(error, InputError) or os.environ.get("PROSTATE_SEG_DEBUG") == "1":
            traceback.print_exception(error)
        write_error(str(error))
        if replace_error:
            sys.exit(1)


@contextmanager
def _ignore_sigterm() -> Iterator[None]:
    """Ignore SIGTERM while a run is closed: a scheduler that sends it twice has effect with the first."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
