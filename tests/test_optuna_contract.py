"""Contract of the private and experimental parts of Optuna, its Hydra sweeper and Hydra that `sweeping/` uses.

A failure after an upgrade means that the adapter named in the test must be adapted.
"""

from pathlib import Path

import optuna
import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import Trial, TrialState
from sqlalchemy import text

from prostate_seg.sweeping.grid import GridSweeper, job_error

pytestmark = pytest.mark.filterwarnings("ignore")


def test_optuna_queues_a_stale_trial_again_with_settings_reports_and_attributes(tmp_path: Path) -> None:
    """Adapter: study.py."""
    retry = RetryHeartbeatStaleTrialCallback(max_retry=1, inherit_intermediate_values=True)
    storage = RDBStorage(
        f"sqlite:///{tmp_path}/optuna.db", heartbeat_interval=1, grace_period=60, heartbeat_stale_trial_callback=retry
    )
    study = optuna.create_study(storage=storage, study_name="one")
    settings = []
    for attempt in range(2):
        trial = study.ask()  # a queued trial before a new one
        settings.append(trial._suggest("x", FloatDistribution(0.0, 1.0)))
        trial.report(0.5, attempt)
        trial.set_user_attr("owner", "me")
        storage.record_heartbeat(trial._trial_id)
        fail_stale_trials(study)
        assert study.trials[attempt].state is TrialState.RUNNING
        with storage.engine.begin() as connection:
            connection.execute(text("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'"))
        fail_stale_trials(study)
    assert [one.state for one in study.trials] == [TrialState.FAIL, TrialState.FAIL]  # max_retry
    assert settings[0] == settings[1]
    second = study.trials[1]
    assert (retry.retried_trial_number(study.trials[0]), retry.retried_trial_number(second)) == (None, 0)
    assert retry.retry_history(second) == [0]
    assert second.intermediate_values == {0: 0.5, 1: 0.5}
    assert second.user_attrs["owner"] == "me"
    assert Trial(study, second._trial_id).params == {"x": settings[0]}


def test_optuna_returns_a_running_trial_to_the_queue_under_its_number(tmp_path: Path) -> None:
    """Adapter: study.py, where a process releases its trials on a stop signal."""
    storage = RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
    study = optuna.create_study(storage=storage, study_name="one")
    trial = study.ask()
    value = trial._suggest("x", FloatDistribution(0.0, 1.0))
    assert storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    again = study.ask()
    assert again.number == trial.number
    assert again._suggest("x", FloatDistribution(0.0, 1.0)) == value


def test_hydra_optuna_sweeper_parses_search_spaces() -> None:
    """Adapter: search_space.py."""
    words = ["a=interval(0, 1.5)", "b=choice(x, y)", "c=range(2, 9, 2)", "d=tag(log, interval(1e-4, 1))", "e=3", "~f"]
    space, fixed, deletions = create_params_from_overrides(words)
    assert space == {
        "a": FloatDistribution(0.0, 1.5),
        "b": CategoricalDistribution(["x", "y"]),
        "c": IntDistribution(2, 8, step=2),
        "d": FloatDistribution(1e-4, 1, log=True),
    }
    assert (fixed, deletions) == ({"e": "3"}, ["~f"])
    assert OptunaSweeperImpl._to_grid_sampler_choices(space["c"]) == [2, 4, 6, 8]
    with pytest.raises(ValueError, match="discrete"):
        OptunaSweeperImpl._to_grid_sampler_choices(space["a"])


def test_hydra_optuna_sweeper_keeps_its_settings_where_the_search_reads_them() -> None:
    """Adapter: search_space.py and sweeper.py."""
    stock = OptunaSweeper(
        sampler=None, direction=["maximize"], storage=None, study_name="one", n_trials=3, n_jobs=2,
        max_failure_rate=1.0, custom_search_space=None, params=OmegaConf.create({"a": "choice(1, 2)"}),
    ).sweeper  # fmt: skip
    assert (stock.study_name, stock.n_trials, stock.n_jobs) == ("one", 3, 2)
    assert stock._parse_sweeper_params_config() == ["a=choice(1, 2)"]


def test_hydra_job_keeps_the_error_of_a_failed_job() -> None:
    """Adapter: job_error in grid.py."""
    job, error = JobReturn(), ValueError("fault")
    job.status, job.return_value = JobStatus.FAILED, error
    assert job_error(job) is error


def test_hydra_basic_sweeper_splits_chains_of_stages_into_single_jobs() -> None:
    """Adapter: grid.py."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(["stage=a,b", "x=1"])
    assert GridSweeper.split_arguments(parsed, None) == [[["x=1", "stage=a"]], [["x=1", "stage=b"]]]
    swept = OverridesParser.create().parse_overrides(["stage=a,b", "seed=1,2"])  # a seed is tested after its training
    jobs = [" ".join(words) for (words,) in GridSweeper.split_arguments(swept, None)]
    assert jobs == ["seed=1 stage=a", "seed=1 stage=b", "seed=2 stage=a", "seed=2 stage=b"]
