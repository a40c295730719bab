"""A study that many processes work on never loses a trial, runs one twice or holds more than were asked for."""

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
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.operations.process import this_process
from prostate_seg.sweeping import study as studies
from prostate_seg.sweeping.study import MOST_DEATHS, SharedStudy, judge, open_study
from tests.project_helpers import until
from tests.server_helpers import postgres_server, why_no_postgres

SPACE = {"x": FloatDistribution(0.0, 1.0)}
QUESTION = {"train.max_epochs": "2"}


def opened(address: str, question: Mapping[str, str] = QUESTION, **objectives: str) -> SharedStudy:
    wanted = objectives or {"objective": "maximize"}
    return open_study(address, "one", objectives=wanted, sampler=RandomSampler(), question=question)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/optuna.db"


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The address of an empty database on a server of its own."""
    reason = why_no_postgres()
    if reason is not None:
        pytest.skip(f"no Postgres here: {reason}")
    with postgres_server("study") as addresses:
        yield addresses["study"]


def disown(trial: optuna.Trial, **owner: str) -> None:
    """Let a trial look like that of another process."""
    trial.set_user_attr("owner", this_process().as_tags() | {f"process.{key}": value for key, value in owner.items()})


def test_claims_end_at_the_number_that_was_asked_for(address: str) -> None:
    one, other = opened(address), opened(address)
    assert [trial.number for trial in one.claim(num_trials=3, at_most=2)] == [0, 1]
    assert [trial.number for trial in other.claim(num_trials=3, at_most=2)] == [2]
    assert one.claim(num_trials=3, at_most=2) == []
    assert one.is_anything_running()


def test_trial_of_a_dead_process_is_taken_over_with_its_number_and_settings(address: str) -> None:
    shared = opened(address)
    (trial,) = shared.claim(num_trials=1, at_most=1)
    settings = shared.suggest(trial, SPACE)
    assert shared.claim(num_trials=1, at_most=1) == []
    disown(trial, pid="1", process_started="0")
    (again,) = opened(address).claim(num_trials=1, at_most=1)
    assert again.number == trial.number
    assert shared.suggest(again, SPACE) == settings
    assert shared.claim(num_trials=1, at_most=1) == []  # it has a process again


def test_trial_of_another_machine_is_left_alone_until_it_is_silent(address: str) -> None:
    shared = opened(address)
    (trial,) = shared.claim(num_trials=1, at_most=1)
    disown(trial, host="elsewhere")
    assert shared.claim(num_trials=1, at_most=1) == []
    disown(trial, host="elsewhere", heartbeat="2020-01-01T00:00:00+00:00")
    assert [one.number for one in shared.claim(num_trials=1, at_most=1)] == [0]


def test_sign_of_life_is_given_while_a_trial_runs(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "HEARTBEAT_SECONDS", 0.02)
    shared = opened(address)
    (trial,) = shared.claim(num_trials=1, at_most=1)
    disown(trial, host="elsewhere", heartbeat="2020-01-01T00:00:00+00:00")
    with shared.kept_alive([trial]):
        until(lambda: "2020" not in trial.study.trials[0].user_attrs["owner"]["process.heartbeat"], 10)


def test_trial_whose_processes_keep_dying_fails_but_one_that_was_told_to_stop_does_not(address: str) -> None:
    shared = opened(address)
    for died in [False] * MOST_DEATHS + [True] * MOST_DEATHS:
        (trial,) = shared.claim(num_trials=1, at_most=1)
        shared.take_back([trial]) if died else shared.give_back([trial])
    assert shared.claim(num_trials=1, at_most=1) == []
    assert shared.counts()["FAIL"] == 1
    assert shared.last_reason() == f"its process died {MOST_DEATHS} times, as when memory is short"


def test_study_of_another_question_is_refused_with_what_differs(address: str) -> None:
    opened(address)
    opened(address)
    with pytest.raises(ConfigError, match="train.max_epochs: 2 -> 3"):
        opened(address, {"train.max_epochs": "3"})


def test_storage_without_a_driver_or_a_folder_is_refused_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Install a driver") as refused:
        opened("postgresql+pg8000://ann:hunter2@127.0.0.1:9/x")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(InputError, match="does not exist"):
        opened(f"sqlite:///{tmp_path}/absent/optuna.db")


def test_grid_ends_with_its_last_point(address: str) -> None:
    sampler = GridSampler({"x": [0.25, 0.5]}, seed=1)
    shared = open_study(address, "one", objectives={"objective": "maximize"}, sampler=sampler, question=QUESTION)
    found = []
    for _ in range(2):
        (trial,) = shared.claim(num_trials=2, at_most=1)
        found.append(shared.suggest(trial, SPACE)["x"])
        shared.complete(trial, [found[-1]])
    assert sorted(found) == [0.25, 0.5]
    assert [best.value for best in shared.best()] == [0.5]


@pytest.fixture
def away(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Moves the study's file away; another call puts it back."""
    monkeypatch.setattr(studies, "SECONDS_BETWEEN_TRIES", 0.02)
    file, elsewhere = tmp_path / "optuna.db", tmp_path / "elsewhere.db"

    def move() -> None:
        elsewhere.replace(file) if elsewhere.exists() else file.replace(elsewhere)

    return move


def test_storage_that_comes_back_is_waited_for(address: str, away: Callable[[], None]) -> None:
    shared = opened(address)
    (trial,) = shared.claim(num_trials=1, at_most=1)
    away()
    back = threading.Timer(0.3, away)
    back.start()
    shared.complete(trial, [0.5])
    back.join()
    shared.complete(trial, [0.5])  # told again, because nobody knows whether a call that failed went through
    assert [best.value for best in opened(address).best()] == [0.5]


def test_storage_that_stays_away_stops_the_search_but_no_training(
    address: str, away: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "SECONDS_TO_COME_BACK", 0.1)
    shared = opened(address)
    (trial,) = shared.claim(num_trials=1, at_most=1)
    is_hopeless = judge(address, "one", number=0, pruner=optuna.pruners.ThresholdPruner(lower=1.0))
    away()
    assert not is_hopeless(1, 0.0)
    with pytest.raises(InputError, match="the same command goes on"):
        shared.complete(trial, [0.5])
    shared.give_back([trial])  # a person stops the search
    away()
    assert is_hopeless(2, 0.0)


def test_pruner_hears_of_each_step_once_and_judges_from_all_trials(address: str) -> None:
    shared = opened(address)
    for value in (0.5, 0.6):
        (trial,) = shared.claim(num_trials=3, at_most=1)
        is_hopeless = judge(address, "one", number=trial.number, pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
        assert not is_hopeless(1, value)
        shared.complete(trial, [value])
    (trial,) = shared.claim(num_trials=3, at_most=1)
    for _ in range(2):  # told again after an interruption
        is_hopeless = judge(address, "one", number=2, pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
        assert is_hopeless(1, 0.1)
    shared.prune(trial)
    assert shared.study.trials[2].intermediate_values == {1: 0.1}
    assert [best.number for best in shared.best()] == [1]


def test_nothing_is_pruned_for_two_objectives(address: str) -> None:
    shared = opened(address, objective="maximize", seconds="minimize")
    shared.claim(num_trials=1, at_most=1)
    assert not judge(address, "one", number=0, pruner=optuna.pruners.ThresholdPruner(lower=1.0))(1, 0.0)


def test_trials_of_a_long_search_hold_no_connections(postgres: str) -> None:
    """A Postgres server takes a hundred, of all processes together."""
    shared = opened(postgres)
    for trial in shared.claim(num_trials=10, at_most=10):
        judge(postgres, "one", number=trial.number, pruner=optuna.pruners.NopPruner())(1, 0.5)
    with create_engine(postgres, poolclass=NullPool).connect() as connection:
        num_open = connection.execute(
            text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
        ).scalar()
    assert num_open == 0
    optuna.delete_study(study_name="one", storage=postgres)  # for the next test


NUM_TRIALS, NUM_WORKERS = 64, 8


def work(address: str, folder: Path) -> None:
    """Do as the sweeper does; a line in a file stands for each training."""
    shared = opened(address)
    while True:
        trials = shared.claim(num_trials=NUM_TRIALS, at_most=1)
        if not trials and not shared.is_anything_running():
            return
        for trial in trials:
            (folder / f"{os.getpid()}.started").write_text(str(trial.number))
            time.sleep(0.02)
            if (folder / "hang").exists() and not (folder / "hung").exists():
                (folder / "hung").write_text(str(os.getpid()))
                time.sleep(60)
            with (folder / f"{os.getpid()}.done").open("a") as file:
                file.write(f"{trial.number}\n")
            shared.complete(trial, [shared.suggest(trial, SPACE)["x"]])
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
    assert done == list(range(NUM_TRIALS))
    assert opened(address).counts()["COMPLETE"] == NUM_TRIALS
