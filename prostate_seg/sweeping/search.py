"""Search of settings: runs the trials that a study still lacks, and reports the best.

The folder of a trial has the number of its first attempt; a further attempt continues the training in it.
"""

import logging
import time
from collections.abc import Mapping, Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl
from omegaconf import DictConfig
from optuna.trial import Trial, TrialState

from prostate_seg.cli import typed_word
from prostate_seg.common.errors import ConfigError, InputError, Pruned, first_line
from prostate_seg.common.files import md5_of
from prostate_seg.common.settings import flat, plain
from prostate_seg.config import schema as configuration
from prostate_seg.config.schema import Config, science_of
from prostate_seg.config.workspace import workspace_of
from prostate_seg.operations.job import command_of
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.sweeping.cost_estimate import log_cost_estimate, num_folds_of
from prostate_seg.sweeping.grid import job_error
from prostate_seg.sweeping.identity import sweep_path
from prostate_seg.sweeping.search_space import SearchSpace, example_overrides, num_trials_of, search_space
from prostate_seg.sweeping.study import SharedStudy, open_study, original_number

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Time between two claims of a process while all trials run in other processes."""


class Search:
    """The trials of one study that this process runs."""

    def __init__(self, stock: OptunaSweeperImpl, objectives: Mapping[str, str]) -> None:
        assert stock.config is not None
        assert stock.launcher is not None
        assert stock.hydra_context is not None
        self.stock, self.config = stock, stock.config
        self.launcher, self.config_loader = stock.launcher, stock.hydra_context.config_loader
        self.objectives = objectives
        self.cfg: Config = configuration.parse(stock.config)
        self.redactor = Redactor(settings=plain(self.cfg))

    def run(self, arguments: Sequence[str]) -> None:
        """Run trials until the study has n_trials, and log the best.

        Raises:
            ConfigError: If the search is not possible, or its study was begun with other settings or data.
            InputError: If no trial is complete.
        """
        space, fixed = search_space(self.stock, arguments, self.config_loader)
        self._compose([*fixed, *example_overrides(space)])  # refuses settings that do not exist
        num_trials = num_trials_of(self.stock, space)
        study = open_study(
            str(self.stock.storage),
            str(self.stock.study_name),
            objectives=self.objectives,
            sampler=self.stock.sampler,
            comparability=self._comparability_key(space),
        )
        counts = study.counts()
        num_missing = max(0, num_trials - sum(counts.values()) + counts["RUNNING"] + counts["WAITING"])
        log.info("study %s: %d of %d trials are missing", self.stock.study_name, num_missing, num_trials)
        if num_missing:
            log_cost_estimate(self.cfg, num_trials=num_missing, num_folds=num_folds_of(self.cfg))
        while num_missing:
            trials = study.claim(num_trials=num_trials, at_most=self.stock.n_jobs)
            if trials:
                self._run_trials(study, trials, space, fixed)
            else:  # another process may be killed, and its trial left to this one
                counts = study.counts()
                num_missing = counts["RUNNING"] + counts["WAITING"]
                time.sleep(POLL_SECONDS if num_missing else 0)
        self._report(study, fixed)
        if self.cfg.mlflow.tracking_uri is not None:
            from prostate_seg.tracking.sweeps import mark_complete  # imports mlflow

            mark_complete(self.cfg, sweep_path(self.config))

    def _comparability_key(self, space: SearchSpace) -> dict[str, str]:
        """Return what trials must share to be compared: all settings that are not searched, and the prepared data."""
        workspace = workspace_of(self.cfg)
        files = (workspace.dataset_csv, workspace.contract_json, workspace.kfold_json)
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is absent: run stage=preprocess and stage=prepare first")
        groups = tuple(f"{name.lstrip('+')}." for name in space)  # model=unet,attention_unet searches all of model
        settings = {
            key: value
            for key, value in flat(science_of(self.cfg)).items()
            if key not in (*space, "data.root") and not key.startswith(groups)
        }
        return {
            **settings,
            **{f"search {name}": str(values) for name, values in space.items()},
            **{f"objective {name}": direction for name, direction in self.objectives.items()},
            **{f"md5 of {file.name}": md5_of(file) for file in files},
        }

    def _run_trials(
        self, study: SharedStudy, trials: Mapping[int, Trial], space: SearchSpace, fixed: Sequence[str]
    ) -> None:
        """Run some trials in parallel and record their results in the study."""
        jobs: dict[int, list[str]] = {}
        for number, trial in trials.items():
            overrides = self._overrides_of(study, trial, number, space, fixed)
            try:
                configuration.parse(self._compose(overrides))
            except ConfigError as error:
                self._fail(study, trial, number, error)
            else:
                jobs[number] = overrides
        if not jobs:
            return
        running = {number: trials[number] for number in jobs}
        try:
            with study.heartbeat(running.values()):
                returns = self.launcher.launch(list(jobs.values()), initial_job_idx=min(jobs))
        except HydraException:
            raise
        except Exception as error:  # a job was killed, and its launcher does not report which
            log.warning("trials %s are retried: %s", ", ".join(map(str, jobs)), _first_line(error))
            for trial in running.values():
                study.tell(trial, TrialState.FAIL)
            return
        except BaseException:  # Ctrl-C, SIGTERM
            study.release(running.values())
            raise
        for (number, trial), job in zip(running.items(), returns, strict=True):
            self._record(study, trial, number, job)

    def _overrides_of(
        self, study: SharedStudy, trial: Trial, number: int, space: SearchSpace, fixed: Sequence[str]
    ) -> list[str]:
        """Return the overrides of a trial's job."""
        is_retry = bool(trial.params)
        settings = [f"{name}={value}" for name, value in study.suggest(trial, space).items()]
        # the training of an earlier attempt may have finished just before its process was killed
        skipping = ["mlflow.skip_finished=true"] if is_retry else []
        return [*settings, *fixed, f"hydra.sweep.subdir={number}", *skipping]

    def _record(self, study: SharedStudy, trial: Trial, number: int, job: JobReturn) -> None:
        """Record the result of a trial's job."""
        if job.status is JobStatus.COMPLETED:
            values = [job.return_value[name] for name in self.objectives]
            study.tell(trial, TrialState.COMPLETE, values)
            log.info("trial %d: %s", number, self._shown(values))
        elif isinstance(error := job_error(job), Pruned):
            study.tell(trial, TrialState.PRUNED)
            log.info("trial %d: %s", number, error)
        else:
            self._fail(study, trial, number, error)

    def _fail(self, study: SharedStudy, trial: Trial, number: int, error: BaseException) -> None:
        reason = self.redactor.text(_first_line(error))
        study.fail(trial, reason)
        log.warning("trial %d has failed: %s", number, reason)

    def _report(self, study: SharedStudy, fixed: Sequence[str]) -> None:
        counts, name = study.counts(), self.stock.study_name
        if not counts["COMPLETE"]:
            raise InputError(
                f"none of the {sum(counts.values())} trials of study {name} has finished; "
                f"the last: {study.last_reason()}\n"
                "Fix that, and begin another study: hydra.sweeper.study_name=NAME"
            )
        ended = [counts[state] for state in ("COMPLETE", "PRUNED", "FAIL")]
        log.info("study %s: %d trials trained, %d pruned, %d failed", name, *ended)
        for best in study.best():
            log.info("best: trial %d, %s; to train it here:", original_number(best), self._shown(best.values))
            settings = [f"{name}={value}" for name, value in best.params.items()]
            log.info("  %s", command_of([*map(typed_word, fixed), *settings]))

    def _shown(self, values: Sequence[float]) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(self.objectives, values, strict=True))

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        composed: DictConfig = self.config_loader.load_sweep_config(self.config, list(overrides))
        return composed


def _first_line(error: BaseException) -> str:
    """Return the first line of an error, with its class unless it is one of ours."""
    line = first_line(error)
    return line if isinstance(error, InputError | ConfigError) else f"{type(error).__name__}: {line}"
