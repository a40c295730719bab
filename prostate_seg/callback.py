"""Hydra's hooks: a run is open before the stage starts and closed after Hydra has written the last line of its log.

Hydra turns an exception of a callback into a warning and goes on, so every failure in here leaves as SystemExit, with exit
code 1 and words for a person. Imports MLflow only when a stage really starts.
"""

import importlib
import logging
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from prostate_seg.cli import BAD_COMMAND, FAILED, leave, no_option_message, require_inputs, typed_word
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import write_text
from prostate_seg.config import schema as configuration
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import workspace_of
from prostate_seg.operations.cluster import cluster_job_key, heed_cluster_signals, is_cluster_job
from prostate_seg.operations.job import (
    Job,
    Outcome,
    Recorded,
    Skipped,
    Unrecorded,
    outcome_of,
    terminate,
    typed_arguments,
)
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.stages import QUESTIONS, STAGES, require_stage
from prostate_seg.sweeping.cost_estimate import announce, num_folds_of
from prostate_seg.sweeping.sweeper import is_study, require_training, sweep_place, trial_number
from prostate_seg.tracking.mlflow_defaults import set_mlflow_defaults

log = logging.getLogger(__name__)

NAME_INPUTS = frozenset({"audit", "data", "evaluate", "experiment", "mlflow", "paths", "predict", "register"})
"""Groups that decide what a stage reads: where they are swept, each job has inputs of its own."""

_active: list[Recorded] = []
"""The open run of this process, at most one; __main__ asks for it."""


_held: list[Any] = []
"""What says in the workspace that the stage of this process runs, at most one; see operations/workspace_lock.py."""


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


class JobFailed(SystemExit):
    """The one job of a command failed, and leaves by its own error before Hydra prints the overrides as Python has them."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error


class TrackingCallback(Callback):
    """Opens and closes the runs of jobs and of sweeps."""

    _has_begun = False
    """Whether the multirun was accepted: Hydra calls the end hook of a refused one too."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a config or stage that cannot be run before Hydra makes the folder of its log."""
        with _errors_leave():
            HydraConfig.instance().set_config(config)  # for settings that refer to it
            _require_runnable(config, [config.stage])

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the pipeline and, for a real sweep, its run, before any job can look for it."""
        with _errors_leave():
            swept = _swept(config)
            _require_runnable(config, swept.get("stage", [config.stage]), swept=set(swept) - {"stage"})
        self._has_begun = True
        with _failures_leave():
            cfg = _parsed(config)
            if cfg is None or cfg.stage in QUESTIONS:
                return
            is_sweep = is_study(config.hydra) or bool(set(swept) - {"stage"})
            if cfg.mlflow.tracking_uri is not None:
                _tracking("tracking.sweeps").begin_multirun(cfg, sweep_place(config), is_sweep=is_sweep)
            if is_sweep and not is_study(config.hydra):  # a study says itself what it still lacks
                _announce(cfg, swept, is_paired="PairSweeper" in config.hydra.sweeper._target_)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Close the sweep's run with the worst status of its trials, and say how to train the best setting."""
        if not self._has_begun:
            return
        with _failures_leave():
            cfg = _parsed(config)
            if cfg is None or cfg.stage in QUESTIONS or cfg.mlflow.tracking_uri is None:
                return
            command = _tracking("tracking.sweeps").end_multirun(cfg, sweep_place(config), draw=_draw_sweep)
            if command is not None and not is_study(config.hydra):
                log.info("to train the best setting of this sweep:\n  %s", command)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Open the run of a stage."""
        _active.clear()
        _leave_workspace()
        if is_cluster_job():
            heed_cluster_signals()
        elif signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # a worker of a launcher, which main() never entered
            signal.signal(signal.SIGTERM, terminate)
        with _failures_leave():
            _take_secrets_out(config)
            cfg = _parsed(config)
            if cfg is None or cfg.stage not in STAGES:
                return
            occupancy = _tracking("operations.workspace_lock")
            if occupancy.touches(cfg, workspace_of(cfg)):
                _held.append(occupancy.occupy(cfg, workspace_of(cfg)))
            if cfg.stage in QUESTIONS:
                _active.append(Unrecorded())
            else:
                _active.append(_skipped(cfg, _job(config)) or _opened(cfg, _job(config)))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Close it: FINISHED, FAILED or KILLED."""
        with _no_sigterm():
            # Hydra prints the overrides
            job_return.overrides = [_redactor(config).text(word) for word in job_return.overrides or ()]
            is_completed = job_return.status is JobStatus.COMPLETED
            error = None if is_completed else job_return._return_value
            if _active:
                run = _active.pop()
                with _failures_leave(replace_error=is_completed):
                    run.close(Outcome.finished if error is None else outcome_of(error), error)
            _leave_workspace()
        if not is_completed and _exit_code(job_return) == 0:
            sys.exit(1)  # a stage that left by sys.exit(0) has no result, and that is no success
        if isinstance(error, Exception) and not _is_multirun(config):
            raise JobFailed(error)


def close_left(error: BaseException) -> None:
    """Close a run whose end Hydra has not told, because a signal came between the end of its stage and the telling."""
    if _active:
        run = _active.pop()
        with _no_sigterm(), _failures_leave(replace_error=False):
            run.close(outcome_of(error), error)
    _leave_workspace()


def _leave_workspace() -> None:
    while _held:
        _held.pop().end()


def _exit_code(job_return: JobReturn) -> int | None:
    """Return the code of a sys.exit, None for every other end."""
    error = job_return._return_value
    if not isinstance(error, SystemExit):
        return None
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def _parsed(config: DictConfig) -> Config | None:
    """Return the config, or None for one that the stage itself is about to refuse."""
    try:
        return configuration.parse_job(config)
    except ConfigError:
        return None


def _require_runnable(config: DictConfig, stages: Sequence[str | None], *, swept: Iterable[str] = ()) -> None:
    """Check the config and what its stages need, as far as that is known before they run; each job checks its own.

    Raises:
        ConfigError: If the config cannot be used or a stage does not exist.
        InputError: If something that a stage reads does not exist.
    """
    for stage in stages:
        require_stage(stage)
    if _is_multirun(config) and is_study(config.hydra):
        require_training(stages)
    groups = {re.split(r"[./]", key.lstrip("+"))[0] for key in swept}
    if groups & NAME_INPUTS or ("fold" in groups and list(stages) != ["train"]):
        return
    try:
        cfg = configuration.parse_job(config)
    except ConfigError:
        if swept or "${hydra:" in OmegaConf.to_yaml(config.paths):
            return
        raise
    typed = [_redactor(config).text(word) for word in typed_arguments()]
    require_inputs([str(stage) for stage in stages], cfg, typed)


def _is_multirun(config: DictConfig) -> bool:
    return str(config.hydra.mode).endswith("MULTIRUN")


def _job(config: DictConfig) -> Job:
    is_multirun = _is_multirun(config)
    return Job(
        overrides=tuple(map(typed_word, config.hydra.overrides.task)),
        output_dir=Path(config.hydra.runtime.output_dir),
        hydra_dir=config.hydra.output_subdir or ".hydra",
        sweep_folder=sweep_place(config) if is_multirun else None,
        number=_number(config.hydra) if is_multirun else None,
        cluster_key=cluster_job_key(sweep_place(config), config.hydra.job.id) if is_cluster_job() else None,
    )


def _redactor(config: DictConfig) -> Redactor:
    settings: Any = OmegaConf.to_container(config, resolve=False)
    return Redactor(settings=settings)


def _take_secrets_out(config: DictConfig) -> None:
    """Take credentials out of what Hydra has written beside the log: the composed config and the overrides."""
    job, redactor = _job(config), _redactor(config)
    for path in (job.output_dir / job.hydra_dir).glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        if (clean := redactor.text(text)) != text:
            write_text(path, clean)


def _number(hydra: DictConfig) -> int | None:
    number: int | None = OmegaConf.select(hydra, "job.num", throw_on_missing=False, default=None)
    return trial_number(hydra) if is_study(hydra) else number


def _swept(config: DictConfig) -> dict[str, list[str | None]]:
    """Return the settings that a multirun varies, with their values; none for an interval.

    Raises:
        ConfigError: If a setting or option does not exist, or there is no value to try, or no study for an interval.
    """
    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    words += list(config.hydra.overrides.task)
    swept: dict[str, list[str | None]] = {}
    loader = GlobalHydra.instance().config_loader()
    for override in OverridesParser.create(loader).parse_overrides(words):
        if override.is_interval_sweep() and not is_study(config.hydra):
            raise ConfigError(f"{override.input_line}: only a search draws from an interval; add +sweep=optuna")
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
            if not (values or override.is_interval_sweep()):
                raise ConfigError(f"{override.input_line}: has no value to try; glob(...) takes options of a group")
            _require_known(override, values, loader.get_group_options(override.key_or_group))
            swept[override.get_key_element()] = [str(value) for value in values]
    return swept


def _require_known(override: Override, values: Sequence[str], options: Sequence[str]) -> None:
    """Check that a swept setting, or each swept option of a group, exists before the first job runs."""
    key = override.key_or_group
    absent = [
        value for value in values if options and value.strip("'\"") not in options and re.fullmatch(r"[\w'\"]+", value)
    ]
    if [value for value in absent if value != "null"]:
        raise ConfigError(no_option_message(key, absent[0]))
    is_setting = not (options or override.is_value_path or override.is_hydra_override())
    if is_setting and key not in configuration.known_keys():
        raise ConfigError(configuration.unknown_key_message(key))


def _announce(cfg: Config, swept: Mapping[str, Sequence[Any]], *, is_paired: bool) -> None:
    """Say how many trainings a grid or pairs are, and of test cases that they choose nothing."""
    if cfg.stage == "evaluate":
        log.info(
            "a sweep of stage=evaluate has no best trial: test cases choose no setting\n"
            "Choose by the val cases: sweep stage=train."
        )
    if cfg.stage != "train":
        return
    counts = [len(values) for values in swept.values()]
    num_folds = 1 if "fold.index" in swept else num_folds_of(cfg)
    announce(cfg, num_trials=max(counts) if is_paired else math.prod(counts), num_folds=num_folds)


def _skipped(cfg: Config, job: Job) -> Skipped | None:
    """Return what stands for a run that need not be, if mlflow.skip_finished asks for that and there is one."""
    done = (
        _tracking("operations.finished").finished_before(cfg, workspace_of(cfg), job)
        if cfg.mlflow.skip_finished
        else None
    )
    return None if done is None else Skipped(done)


def _opened(cfg: Config, job: Job) -> Recorded:
    run: Recorded = _tracking("tracking.stage_run").open_stage_run(cfg, workspace_of(cfg), job)
    return run


def _draw_sweep(folder: Path, rows: Sequence[tuple[Mapping[str, str], float]]) -> None:
    importlib.import_module("prostate_seg.reporting.sweeps").draw_sweep(folder, rows)


@contextmanager
def _errors_leave() -> Iterator[None]:
    """Exit with the text of an error of the config or of an input, which Hydra would turn into a warning."""
    try:
        yield
    except (ConfigError, HydraException) as error:
        leave(error, str(error), BAD_COMMAND)
    except InputError as error:
        leave(error, str(error), FAILED)


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
    """Import what imports MLflow, which reads its settings from the environment then."""
    set_mlflow_defaults()
    return importlib.import_module(f"prostate_seg.{module}")
