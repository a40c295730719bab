"""A study with many processes loses no trial, trains none twice and has no more than requested."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import GridSampler, RandomSampler
from optuna.trial import TrialState
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.operations.process import process_tags
from prostate_seg.sweeping import study as studies
from prostate_seg.sweeping.study import MAX_ATTEMPTS, SharedStudy, open_study, original_number, pruning_check
from tests.project_helpers import until
from tests.server_helpers import postgres_server, why_no_postgres

SPACE = {"x": FloatDistribution(0.0, 1.0)}
KEY = {"train.max_epochs": "2"}
MEDIAN = optuna.pruners.MedianPruner(n_startup_trials=1)


def opened(address: str, key: Mapping[str, str] = KEY, **objectives: str) -> SharedStudy:
    wanted = objectives or {"objective": "maximize"}
    return open_study(address, "one", objectives=wanted, sampler=RandomSampler(), comparability=key)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/optuna.db"


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Address of an empty database on a new server."""
    reason = why_no_postgres()
    if reason is not None:
        pytest.skip(f"no Postgres here: {reason}")
    with postgres_server("study") as addresses:
        yield addresses["study"]


def one_trial(shared: SharedStudy) -> optuna.Trial:
    (trial,) = shared.claim(num_trials=1, at_most=1).values()
    return trial


def complete(shared: SharedStudy, trial: optuna.Trial, value: float) -> None:
    shared.tell(trial, TrialState.COMPLETE, [value])


def set_owner(trial: optuna.Trial, **owner: str) -> None:
    """Set the owner process of a trial, in the format of this version."""
    tags = process_tags() | {f"process.{key}": value for key, value in owner.items()}
    del tags["process.heartbeat"]
    trial.set_user_attr("owner", tags)


def set_heartbeat(address: str, when: str) -> None:
    with create_engine(address).begin() as connection:
        connection.execute(text("UPDATE trial_heartbeats SET heartbeat = :when"), {"when": when})


def test_claims_end_at_the_requested_number_of_trials(address: str) -> None:
    one, other = opened(address), opened(address)
    assert list(one.claim(num_trials=3, at_most=2)) == [0, 1]
    assert list(other.claim(num_trials=3, at_most=2)) == [2]
    assert one.claim(num_trials=3, at_most=2) == {}
    assert one.counts()["RUNNING"] == 3


def test_trial_of_a_dead_process_is_retried_with_its_number_and_settings(address: str) -> None:
    shared = opened(address)
    trial = one_trial(shared)
    settings = shared.suggest(trial, SPACE)
    assert shared.claim(num_trials=1, at_most=1) == {}
    set_owner(trial, pid="1", process_started="0")
    again = opened(address).claim(num_trials=1, at_most=1)
    assert list(again) == [trial.number]
    assert shared.suggest(again[0], SPACE) == settings
    assert shared.claim(num_trials=1, at_most=1) == {}  # it has an owner process again
    complete(shared, again[0], 0.5)
    assert shared.counts() == {
        "COMPLETE": 1,
        "FAIL": 0,
        "PRUNED": 0,
        "RUNNING": 0,
        "WAITING": 0,
    }  # two attempts are one trial
    assert [original_number(best) for best in shared.best()] == [0]


@pytest.mark.parametrize("owner", [{"host": "elsewhere"}, {"boot_id": "before", "pid": "1"}], ids=["host", "restarted"])
def test_trial_whose_process_cannot_be_checked_is_retried_only_without_heartbeats(
    address: str, owner: dict[str, str]
) -> None:
    shared = opened(address)
    set_owner(one_trial(shared), **owner)
    assert shared.claim(num_trials=1, at_most=1) == {}
    set_heartbeat(address, "2020-01-01 00:00:00")
    assert list(shared.claim(num_trials=1, at_most=1)) == [0]


def test_heartbeats_are_recorded_while_a_trial_runs(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "HEARTBEAT_SECONDS", 0.02)
    shared = opened(address)
    trial = one_trial(shared)
    set_owner(trial, host="elsewhere")
    set_heartbeat(address, "2020-01-01 00:00:00")
    with shared.heartbeat([trial]), create_engine(address).connect() as connection:

        def newest() -> str:
            with connection.begin():
                return str(connection.execute(text("SELECT heartbeat FROM trial_heartbeats")).scalar())

        until(lambda: not newest().startswith("2020"), 10)
    assert shared.claim(num_trials=1, at_most=1) == {}


def test_trial_whose_process_is_killed_between_failing_and_queueing_is_not_lost(address: str) -> None:
    shared = opened(address)
    shared.tell(one_trial(shared), TrialState.FAIL)
    assert list(shared.claim(num_trials=1, at_most=1)) == [0]


def test_trial_fails_after_repeated_kills_but_not_after_a_stop_signal(address: str) -> None:
    shared = opened(address)
    for died in [False] * MAX_ATTEMPTS + [True] * MAX_ATTEMPTS:
        trial = one_trial(shared)
        shared.tell(trial, TrialState.FAIL) if died else shared.release([trial])
    assert shared.claim(num_trials=1, at_most=1) == {}
    assert shared.counts()["FAIL"] == 1
    assert shared.last_reason() == f"its process died {MAX_ATTEMPTS} times, as when memory is short"


def test_trial_that_failed_for_a_reason_is_not_retried(address: str) -> None:
    shared = opened(address)
    shared.fail(one_trial(shared), "RuntimeError: fault")
    assert shared.claim(num_trials=1, at_most=1) == {}
    assert shared.last_reason() == "RuntimeError: fault"


def test_study_with_another_comparability_key_is_refused_with_the_differences(address: str) -> None:
    opened(address)
    opened(address)
    with pytest.raises(ConfigError, match="train.max_epochs: 2 -> 3"):
        opened(address, {"train.max_epochs": "3"})


def test_study_begun_under_former_names_of_settings_continues(address: str) -> None:
    former = {"evaluate.flips": "true", "train.num_parallel_folds": "2"}
    opened(address).study.set_user_attr("question", former)
    opened(address, {"evaluate.tta": "true"})
    with pytest.raises(ConfigError, match="evaluate.tta: true -> false"):
        opened(address, {"evaluate.tta": "false"})


def test_search_of_a_setting_under_its_former_name_continues(address: str) -> None:
    opened(address).study.set_user_attr("question", {"search evaluate.flips": "[true,false]"})
    opened(address, {"search evaluate.tta": "[true,false]"})


def test_storage_without_a_driver_or_a_folder_is_refused_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Install a driver") as refused:
        opened("postgresql+pg8000://ann:hunter2@127.0.0.1:9/x")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(InputError, match="does not exist"):
        opened(f"sqlite:///{tmp_path}/absent/optuna.db")


def test_grid_ends_with_its_last_point(address: str) -> None:
    sampler = GridSampler({"x": [0.25, 0.5]}, seed=1)
    shared = open_study(address, "one", objectives={"objective": "maximize"}, sampler=sampler, comparability=KEY)
    found = []
    for _ in range(2):
        (trial,) = shared.claim(num_trials=2, at_most=1).values()
        found.append(shared.suggest(trial, SPACE)["x"])
        complete(shared, trial, found[-1])
    assert sorted(found) == [0.25, 0.5]
    assert [best.value for best in shared.best()] == [0.5]


@pytest.fixture
def toggle_storage(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Move the file of the study away, or back."""
    monkeypatch.setattr(studies, "SECONDS_BETWEEN_TRIES", 0.02)
    file, elsewhere = tmp_path / "optuna.db", tmp_path / "elsewhere.db"

    def move() -> None:
        elsewhere.replace(file) if elsewhere.exists() else file.replace(elsewhere)

    return move


def test_calls_are_retried_until_the_storage_is_available(address: str, toggle_storage: Callable[[], None]) -> None:
    shared = opened(address)
    trial = one_trial(shared)
    toggle_storage()
    back = threading.Timer(0.3, toggle_storage)
    back.start()
    complete(shared, trial, 0.5)
    back.join()
    complete(shared, trial, 0.5)  # repeated, because a call that failed may have succeeded in the database
    assert [best.value for best in opened(address).best()] == [0.5]


def test_unavailable_storage_stops_the_search_but_no_training(
    address: str, toggle_storage: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "STORAGE_TIMEOUT_S", 0.1)
    shared = opened(address)
    trial = one_trial(shared)
    should_prune = pruning_check(address, "one", number=0, pruner=optuna.pruners.ThresholdPruner(lower=1.0))
    toggle_storage()
    assert not should_prune(1, 0.0)
    with pytest.raises(InputError, match="the same command goes on"):
        complete(shared, trial, 0.5)
    shared.release([trial])  # Ctrl-C of the user
    toggle_storage()
    assert should_prune(2, 0.0)


def test_each_step_is_reported_once_and_the_pruner_compares_all_trials(address: str) -> None:
    shared = opened(address)
    for value in (0.5, 0.6):
        (trial,) = shared.claim(num_trials=3, at_most=1).values()
        should_prune = pruning_check(
            address, "one", number=trial.number, pruner=optuna.pruners.MedianPruner(n_startup_trials=1)
        )
        assert not should_prune(1, value)
        complete(shared, trial, value)
    (trial,) = shared.claim(num_trials=3, at_most=1).values()
    for _ in range(2):  # reported again after an interruption
        should_prune = pruning_check(address, "one", number=2, pruner=MEDIAN)
        assert should_prune(1, 0.1)
    shared.tell(trial, TrialState.PRUNED)
    assert shared.study.trials[2].intermediate_values == {1: 0.1}
    assert [best.number for best in shared.best()] == [1]


def test_nothing_is_pruned_for_two_objectives(address: str) -> None:
    shared = opened(address, objective="maximize", seconds="minimize")
    shared.claim(num_trials=1, at_most=1)
    assert not pruning_check(address, "one", number=0, pruner=optuna.pruners.ThresholdPruner(lower=1.0))(1, 0.0)


def test_trials_of_a_long_search_keep_no_connections(postgres: str) -> None:
    """A Postgres server accepts a hundred connections in all."""
    shared = opened(postgres)
    for number in shared.claim(num_trials=10, at_most=10):
        pruning_check(postgres, "one", number=number, pruner=optuna.pruners.NopPruner())(1, 0.5)
    with create_engine(postgres, poolclass=NullPool).connect() as connection:
        num_open = connection.execute(
            text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
        ).scalar()
    assert num_open == 0
    optuna.delete_study(study_name="one", storage=postgres)  # for the next test


NUM_TRIALS, NUM_WORKERS = 64, 8


def work(address: str, folder: Path) -> None:
    """Claim and complete trials as the sweeper does; a training is a line in a file."""
    shared = opened(address)
    while True:
        trials = shared.claim(num_trials=NUM_TRIALS, at_most=1)
        counts = shared.counts()
        if not trials and not counts["RUNNING"] + counts["WAITING"]:
            return
        for number, trial in trials.items():
            (folder / f"{os.getpid()}.started").write_text(str(number))
            time.sleep(0.02)
            if (folder / "hang").exists() and not (folder / "hung").exists():
                (folder / "hung").write_text(str(os.getpid()))
                time.sleep(60)
            with (folder / f"{os.getpid()}.done").open("a") as file:
                file.write(f"{number}\n")
            complete(shared, trial, shared.suggest(trial, SPACE)["x"])
        if not trials:
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_eight_processes_of_which_one_is_killed_run_each_of_64_trials_once(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue("postgres" if kind == "postgres" else "address")
    context = get_context("fork")
    (tmp_path / "hang").touch()
    workers = [context.Process(target=work, args=(address, tmp_path)) for _ in range(NUM_WORKERS)]
    for worker in workers:
        worker.start()
    until(lambda: (tmp_path / "hung").exists() and bool((tmp_path / "hung").read_text()), 60)
    os.kill(int((tmp_path / "hung").read_text()), signal.SIGKILL)
    for worker in workers:
        worker.join(120)
    assert sorted(worker.exitcode or 0 for worker in workers) == [-signal.SIGKILL, *[0] * (NUM_WORKERS - 1)]
    done = sorted(int(line) for path in tmp_path.glob("*.done") for line in path.read_text().splitlines())
    assert len(done) == len(set(done)) == NUM_TRIALS  # the retry has its own number in Optuna
    assert opened(address).counts()["COMPLETE"] == NUM_TRIALS
