"""Hydra's hooks: a run is open before the stage starts and closed after Hydra has written the last line of its log.

Hydra turns an exception of a callback into a warning and goes on, so every failure in here leaves as SystemExit, with exit
code 1 and words for a person. Imports MLflow only when a stage really starts.
"""

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from prostate_seg import config as configuration
from prostate_seg.config import Config
from prostate_seg.errors import ConfigError, InputError
from prostate_seg.stages import QUESTIONS, STAGES
from prostate_seg.tracking.job import Job, Outcome, Recorded, Unrecorded, outcome_of, terminate
from prostate_seg.workspace import workspace_of

_active: list[Recorded] = []
"""The open run of this process, at most one; __main__ asks for it."""


def active_run() -> Recorded:
    """Return the open run.

    Raises:
        InputError: If no callback opened one, because the config that is in force has lost it.
    """
    if not _active:
        raise InputError(
            "this config has no tracking callback, and no run stays unrecorded\n"
            "Use the project's own config; to record nothing, mlflow=off."
        )
    return _active[-1]


class TrackingCallback(Callback):
    """Opens and closes the runs of jobs and of sweeps."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the pipeline and, for a real sweep, its run, before any job can look for it."""
        with _failures_leave():
            cfg = _parsed(config)
            if cfg is not None and cfg.stage not in QUESTIONS:
                _tracking("sweeps").begin_multirun(
                    cfg, _sweep_folder(config), is_sweep=_varies_more_than_the_stage(config)
                )

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Close the sweep's run with the worst status of its trials."""
        with _failures_leave():
            cfg = _parsed(config)
            if cfg is not None and cfg.stage not in QUESTIONS:
                _tracking("sweeps").end_multirun(cfg, _sweep_folder(config))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Open the run of a stage."""
        _active.clear()
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # a worker of a launcher, which main() never entered
            signal.signal(signal.SIGTERM, terminate)
        with _failures_leave():
            cfg = _parsed(config)
            if cfg is not None and cfg.stage in QUESTIONS:
                _active.append(Unrecorded())
            elif cfg is not None and cfg.stage in STAGES:
                _active.append(_tracking("stage_run").open_stage_run(cfg, workspace_of(cfg), _job(config)))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Close it: FINISHED, FAILED or KILLED."""
        if not _active:
            return
        run = _active.pop()
        is_completed = job_return.status is JobStatus.COMPLETED
        with _failures_leave(replace_error=is_completed), _no_sigterm():
            run.close(Outcome.finished if is_completed else outcome_of(job_return._return_value))
        if not is_completed and _exit_code(job_return) == 0:
            sys.exit(1)  # a stage that left by sys.exit(0) has no result, and that is no success


def _exit_code(job_return: JobReturn) -> int | None:
    """Return the code of a sys.exit, None for every other end."""
    error = job_return._return_value
    if not isinstance(error, SystemExit):
        return None
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def _parsed(config: DictConfig) -> Config | None:
    """Return the config, or None for one that the stage itself is about to refuse."""
    try:
        plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        return configuration.parse(plain)
    except ConfigError:
        return None


def _job(config: DictConfig) -> Job:
    is_multirun = str(config.hydra.mode).endswith("MULTIRUN")
    return Job(
        overrides=tuple(config.hydra.overrides.task),
        output_dir=Path(config.hydra.runtime.output_dir),
        hydra_dir=config.hydra.output_subdir or ".hydra",
        sweep_folder=_sweep_folder(config) if is_multirun else None,
        number=OmegaConf.select(config, "hydra.job.num", throw_on_missing=False, default=None) if is_multirun else None,
    )


def _sweep_folder(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir).absolute()


def _varies_more_than_the_stage(config: DictConfig) -> bool:
    """Return whether a multirun is a sweep; `-m stage=a,b` is only a chain of stages."""
    if "BasicSweeper" not in config.hydra.sweeper._target_:
        return True
    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    words += list(config.hydra.overrides.task)
    overrides = OverridesParser.create().parse_overrides(words)
    return any(override.is_sweep_override() and override.get_key_element() != "stage" for override in overrides)


@contextmanager
def _failures_leave(*, replace_error: bool = True) -> Iterator[None]:
    """Turn an exception into an exit with code 1, which Hydra cannot swallow.

    Args:
        replace_error: False when the stage's own error is on its way out and must not be replaced.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, InputError) or os.environ.get("PROSTATE_SEG_DEBUG") == "1":
            traceback.print_exception(error)
        sys.stderr.write(f"prostate_seg: {error}\n")
        if replace_error:
            sys.exit(1)


@contextmanager
def _no_sigterm() -> Iterator[None]:
    """Let a closing run close: a scheduler that sends SIGTERM twice is served by the first."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is told of signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tracking(module: str) -> ModuleType:
    """Import what imports MLflow."""
    return importlib.import_module(f"prostate_seg.tracking.{module}")
