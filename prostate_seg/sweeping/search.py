"""Running the trials that a study lacks, and saying which was best. Optuna and all that hashes are imported here.

A trial has its number in the study as the name of its folder, and what it trains lies there.
"""

import importlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from prostate_seg.cli import typed_word
from prostate_seg.common.errors import ConfigError, InputError, Pruned
from prostate_seg.common.files import md5_of
from prostate_seg.config import schema as configuration
from prostate_seg.config.schema import Config, as_container, science_of
from prostate_seg.config.workspace import workspace_of
from prostate_seg.operations.job import command_of
from prostate_seg.provenance.record import flat
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.sweeping.cost_estimate import announce, num_folds_of
from prostate_seg.sweeping.study import SharedStudy, open_study
from prostate_seg.sweeping.sweeper import require_training, sweep_place

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 2.0
"""How often a process without a trial looks whether one of another process was orphaned."""


class Search:
    """One command's part in a study."""

    def __init__(self, stock: OptunaSweeperImpl, objectives: Mapping[str, str]) -> None:
        assert stock.config is not None
        assert stock.launcher is not None
        assert stock.hydra_context is not None
        self.stock, self.config = stock, stock.config
        self.launcher, self.config_loader = stock.launcher, stock.hydra_context.config_loader
        self.objectives = objectives
        self.cfg: Config = configuration.parse(stock.config)
        self.redactor = Redactor(settings=as_container(self.cfg))

    def run(self, arguments: Sequence[str]) -> None:
        """Run trials until the study has as many as were asked for, and say which is best.

        Raises:
            ConfigError: If the search cannot be made, or its study was begun for another one.
            InputError: If no trial has finished.
        """
        require_training([self.cfg.stage])
        space, fixed = self._search_space(arguments)
        num_trials = self._num_trials(space)
        shared = open_study(
            str(self.stock.storage),
            str(self.stock.study_name),
            objectives=self.objectives,
            sampler=self.stock.sampler,
            question=self._question(space),
        )
        self._say_what_is_missing(shared, num_trials)
        while True:
            trials = shared.claim(num_trials=num_trials, at_most=self.stock.n_jobs)
            if trials:
                self._run(shared, trials, space, fixed)
            elif shared.is_anything_running():
                time.sleep(SECONDS_BETWEEN_LOOKS)
            else:
                break
        self._report(shared, fixed)
        if self.cfg.mlflow.tracking_uri is not None:
            sweeps = importlib.import_module("prostate_seg.tracking.sweeps")  # mlflow
            sweeps.mark_complete(self.cfg, sweep_place(self.config))

    def _say_what_is_missing(self, shared: SharedStudy, num_trials: int) -> None:
        counts = shared.counts()
        num_missing = max(0, num_trials - sum(counts.values()) + counts["RUNNING"])
        log.info("study %s: %d of %d trials are missing", self.stock.study_name, num_missing, num_trials)
        if num_missing:
            announce(self.cfg, num_trials=num_missing, num_folds=num_folds_of(self.cfg))

    def _search_space(self, arguments: Sequence[str]) -> tuple[dict[str, BaseDistribution], list[str]]:
        """Return the search space by setting, and the overrides that all trials share."""
        words = without_globs([*self.stock._parse_sweeper_params_config(), *arguments], self.config_loader)
        try:
            space, values, deletions = create_params_from_overrides(words)
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"hydra.sweeper.params: {error}") from error
        space = {name: values_of for name, values_of in space.items() if name not in values}
        if not space:
            raise ConfigError(
                "hydra.sweeper.params: must name a setting to search, such as 'train.learning_rate=interval(1e-4,1e-2)'"
            )
        fixed = [*(f"{name}={value}" for name, value in values.items()), *deletions]
        self._compose([*fixed, *(f"{name}={_first(one)}" for name, one in space.items())])  # are there such settings
        return space, fixed

    def _num_trials(self, space: Mapping[str, BaseDistribution]) -> int:
        """Return how many trials to run, and give a grid its points, of which there may be fewer."""
        stock = self.stock
        if not isinstance(stock.sampler, partial):  # all but the grid are complete
            return int(stock.n_trials)
        try:
            points = {name: stock._to_grid_sampler_choices(values) for name, values in space.items()}
        except ValueError as error:
            raise ConfigError(f"hydra/sweeper/sampler=grid: {error} Use choice(...) or range(...).") from error
        stock.sampler = stock.sampler(points)
        return min(int(stock.n_trials), math.prod(len(values) for values in points.values()))

    def _question(self, space: Mapping[str, BaseDistribution]) -> dict[str, str]:
        """Return what trials must share to be compared: all but what is searched, and the data as prepared."""
        workspace = workspace_of(self.cfg)
        files = (workspace.dataset_csv, workspace.contract_json, workspace.kfold_json)
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is absent: run stage=preprocess and stage=prepare first")
        settings = flat(science_of(self.cfg))
        groups = tuple(f"{name.lstrip('+')}." for name in space)  # model=unet,attention_unet searches all of model
        return {
            **{
                key: value
                for key, value in settings.items()
                if key not in (*space, "data.root") and not key.startswith(groups)
            },
            **{f"search {name}": str(values) for name, values in space.items()},
            **{f"objective {name}": direction for name, direction in self.objectives.items()},
            **{f"md5 of {file.name}": md5_of(file) for file in files},
        }

    def _run(
        self,
        shared: SharedStudy,
        trials: Sequence[Trial],
        space: Mapping[str, BaseDistribution],
        fixed: Sequence[str],
    ) -> None:
        """Run some trials side by side and tell the study what they came to."""
        jobs: dict[Trial, list[str]] = {}
        for trial in trials:
            is_orphan = bool(trial.params)
            settings = shared.suggest(trial, space)
            overrides = [*(f"{name}={value}" for name, value in settings.items()), *fixed]
            overrides.append(f"hydra.sweep.subdir={trial.number}")
            if is_orphan:  # it may have finished just before it became one
                overrides.append("mlflow.skip_finished=true")
            try:
                configuration.parse(self._compose(overrides))
            except ConfigError as error:
                self._fail(shared, trial, error)
            else:
                jobs[trial] = overrides
        returns = self._launch(shared, jobs) if jobs else []
        for trial, job in zip(jobs, returns, strict=False):  # none came back of a launch that died
            self._tell(shared, trial, job)

    def _launch(self, shared: SharedStudy, jobs: Mapping[Trial, Sequence[str]]) -> Sequence[JobReturn]:
        """Return what jobs came to; nothing when one has died, and its launcher does not say which."""
        trials = list(jobs)
        try:
            with shared.kept_alive(trials):
                first = min(trial.number for trial in trials)
                return self.launcher.launch(list(jobs.values()), initial_job_idx=first)
        except HydraException:
            raise
        except Exception as error:
            log.warning("trials %s are run again: %s", ", ".join(str(one.number) for one in trials), _line(error))
            shared.take_back(trials)
            return []
        except BaseException:  # Ctrl-C, SIGTERM
            shared.give_back(trials)
            raise

    def _tell(self, shared: SharedStudy, trial: Trial, job: JobReturn) -> None:
        if job.status is JobStatus.COMPLETED:
            values = [job.return_value[name] for name in self.objectives]
            shared.complete(trial, values)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.objectives, values, strict=True))
            log.info("trial %d: %s", trial.number, shown)
        elif isinstance(job._return_value, Pruned):
            shared.prune(trial)
            log.info("trial %d: %s", trial.number, job._return_value)
        else:
            self._fail(shared, trial, job._return_value)

    def _fail(self, shared: SharedStudy, trial: Trial, error: BaseException) -> None:
        reason = self.redactor.text(_line(error))
        shared.fail(trial, reason)
        log.warning("trial %d has failed: %s", trial.number, reason)

    def _report(self, shared: SharedStudy, fixed: Sequence[str]) -> None:
        counts = shared.counts()
        if not counts["COMPLETE"]:
            raise InputError(
                f"none of the {sum(counts.values())} trials of study {self.stock.study_name} has finished; "
                f"the last: {shared.last_reason()}\n"
                "Mend that, and begin another study: hydra.sweeper.study_name=NAME"
            )
        log.info(
            "study %s: %d trials trained, %d stopped early, %d failed",
            self.stock.study_name,
            counts["COMPLETE"],
            counts["PRUNED"],
            counts["FAIL"],
        )
        for best in shared.best():
            values = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.objectives, best.values, strict=True))
            log.info("best: trial %d, %s; to train it here:", best.number, values)
            log.info(
                "  %s",
                command_of([*map(typed_word, fixed), *(f"{name}={value}" for name, value in best.params.items())]),
            )

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        composed: DictConfig = self.config_loader.load_sweep_config(self.config, list(overrides))
        return composed


def _first(values: BaseDistribution) -> object:
    """Return one of the values."""
    if isinstance(values, CategoricalDistribution):
        return values.choices[0]
    assert isinstance(values, IntDistribution | FloatDistribution)
    return values.low


def without_globs(words: Sequence[str], loader: ConfigLoader) -> list[str]:
    """Return overrides with glob(...) as the choice that it stands for: Optuna's sweeper does not know a group's options."""
    parsed = OverridesParser.create(loader).parse_overrides(list(words))
    globs = {one.input_line: one for one in parsed if one.value_type is ValueType.GLOB_CHOICE_SWEEP}
    choices = {
        word: f"{one.get_key_element()}=choice({','.join(one.sweep_string_iterator())})" for word, one in globs.items()
    }
    return [choices.get(word, word) for word in words]


def _line(error: BaseException) -> str:
    """Return the first line of an error, with its kind where it is none of ours."""
    text = next(iter(str(error).splitlines()), "")
    return text if isinstance(error, InputError | ConfigError) else f"{type(error).__name__}: {text}"
