"""An Optuna study shared by any number of processes: claims, heartbeats, retries and results of its trials.

A trial is claimed under a lock shared by all processes of the storage, and its process records heartbeats. A trial whose
process was killed is failed and queued again with its settings by Optuna's retry callback, as another attempt of the same
trial; folders, runs and messages have the number of the first attempt. So a study never holds more trials than were asked
for. Whatever is experimental or private in Optuna is used here alone; tests/test_optuna_contract.py checks it.
"""

import copy
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GridSampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from prostate_seg.common.address import resolved_uri, shown_address, sqlite_file
from prostate_seg.common.errors import ConfigError, InputError, first_line
from prostate_seg.common.suggestions import present_name
from prostate_seg.operations.process import (
    HEARTBEAT_SECONDS,
    SILENT_AFTER,
    is_alive,
    now_text,
    process_tags,
)

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""A trial whose process has been killed this often fails: it may need more memory than there is."""
LOCK_KEY = 20_260_118
"""Key of the advisory lock of studies inside a Postgres database."""
SQLITE_TIMEOUT_S = 60
"""Longest wait for a sqlite file that another process writes."""
STORAGE_TIMEOUT_S = 300.0
"""Longest wait for a storage that has become unavailable; what trials have trained is on disk."""
SECONDS_BETWEEN_TRIES = 2.0

OWNER = "owner"
"""User attribute of a trial: the process that runs it."""
REASON = "reason"
"""User attribute of a trial: why it failed; absent if its process was killed."""
COMPARABILITY_KEY = "question"
"""User attribute of a study, under the name it has in existing studies."""

STORAGE_ERRORS = (SQLAlchemyError, StorageInternalError, OSError, ImportError)
"""Errors of an unusable storage; ImportError if the driver of its database is not installed."""

with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
    RETRY = RetryHeartbeatStaleTrialCallback(max_retry=MAX_ATTEMPTS - 1, inherit_intermediate_values=True)

P = ParamSpec("P")
T = TypeVar("T")


def _wait_for_storage(call: Callable[[], T], uri: str) -> T:
    """Return the value of an idempotent call, repeated while the storage is unavailable.

    Raises:
        InputError: If the storage stays unavailable for STORAGE_TIMEOUT_S.
    """
    deadline, is_logged = time.monotonic() + STORAGE_TIMEOUT_S, False
    while True:
        try:
            return call()
        except STORAGE_ERRORS as error:
            message = f"the study's storage {shown_address(uri)} is unavailable: {_first_line(error)}"
            if time.monotonic() > deadline:
                raise InputError(
                    f"{message}\nWhat was trained is kept: once it is back, the same command goes on"
                ) from error
            if not is_logged:
                log.warning("%s\nRetrying for %.0f s at most", message, STORAGE_TIMEOUT_S)
                is_logged = True
        time.sleep(SECONDS_BETWEEN_TRIES)


def _retry_while_unavailable(
    method: Callable[Concatenate["SharedStudy", P], T],
) -> Callable[Concatenate["SharedStudy", P], T]:
    @wraps(method)
    def call(self: "SharedStudy", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return _wait_for_storage(partial(method, self, *args, **kwargs), self._uri)

    return call


class SharedStudy:
    """A study that other processes work on too.

    Raises:
        InputError: By each method, if the storage stays unavailable.
    """

    def __init__(self, study: optuna.Study, storage: RDBStorage, uri: str) -> None:
        self.study = study
        self._storage = storage
        self._uri = uri

    @_retry_while_unavailable
    def claim(self, *, num_trials: int, at_most: int) -> dict[int, Trial]:
        """Return trials for this process to run, by number: queued ones first, then new ones up to `num_trials`."""
        with _claim_lock(self._uri):
            self._queue_orphans()
            attempts = latest_attempts(self.study).values()
            num_queued = sum(one.state is TrialState.WAITING for one in attempts)
            num_claimed = min(at_most, num_queued + max(0, num_trials - len(attempts)))
            trials = [self.study.ask() for _ in range(num_claimed)]
            for trial in trials:
                self._storage.record_heartbeat(trial._trial_id)
                trial.set_user_attr(OWNER, process_tags())
            return {original_number(self._storage.get_trial(trial._trial_id)): trial for trial in trials}

    def _queue_orphans(self) -> None:
        """Queue again the running trials whose process was killed, up to MAX_ATTEMPTS times."""
        fail_stale_trials(self.study)  # those without a heartbeat for SILENT_AFTER, on any machine
        for one in latest_attempts(self.study).values():
            if one.state is TrialState.RUNNING and _has_dead_owner(one):  # on this machine at once
                self.tell(one.number, TrialState.FAIL)
        for one in latest_attempts(self.study).values():
            if _is_retried(one):
                RETRY(self.study, copy.deepcopy(one))  # the callback appends to the trial's own list

    def release(self, trials: Iterable[Trial]) -> None:
        """Queue trials again because this process was interrupted, which is not a failed attempt."""
        with suppress(*STORAGE_ERRORS):  # its end releases them too, only later
            for trial in trials:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    @_retry_while_unavailable
    def suggest(self, trial: Trial, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """Return the settings of a trial; a further attempt has those of the first."""
        return {name: trial._suggest(name, distribution) for name, distribution in space.items()}

    @_retry_while_unavailable
    def tell(self, trial: Trial | int, state: TrialState, values: Sequence[float] | None = None) -> None:
        """Record the final state of a trial; the next claim retries a failed one unless `fail` gave the reason."""
        try:
            self.study.tell(trial, values, state, skip_if_finished=True)
        except RuntimeError:
            # The state is stored. A grid without further points stops Optuna's own loop, which is not used here.
            if not isinstance(self.study.sampler, GridSampler):
                raise

    @_retry_while_unavailable
    def fail(self, trial: Trial, reason: str) -> None:
        """Record that a trial failed for a reason that a retry would not change."""
        trial.set_user_attr(REASON, reason)
        self.tell(trial, TrialState.FAIL)

    @_retry_while_unavailable
    def counts(self) -> dict[str, int]:
        """Return the number of trials by state; attempts of one trial count once."""
        attempts = latest_attempts(self.study).values()
        states = [TrialState.WAITING if _is_retried(one) else one.state for one in attempts]
        return {state.name: states.count(state) for state in TrialState}

    @_retry_while_unavailable
    def best(self) -> list[FrozenTrial]:
        """Return the best trial, or the Pareto front of several objectives; empty if none is complete."""
        return self.study.best_trials if self.counts()["COMPLETE"] else []

    @_retry_while_unavailable
    def last_reason(self) -> str:
        """Return why the newest failed trial failed."""
        failed = [one for one in latest_attempts(self.study).values() if one.state is TrialState.FAIL]
        died = f"its process died {MAX_ATTEMPTS} times, as when memory is short"
        return str(failed[-1].user_attrs.get(REASON, died)) if failed else ""

    @contextmanager
    def heartbeat(self, trials: Collection[Trial]) -> Iterator[None]:
        """Record heartbeats of trials while their jobs run.

        Not by Optuna's own thread: an error of the storage would end it, and with it the heartbeats of a trial that trains on.
        """
        is_over = threading.Event()

        def beat() -> None:
            while not is_over.wait(HEARTBEAT_SECONDS):
                with suppress(*STORAGE_ERRORS):  # the next one may succeed
                    for trial in trials:
                        self._storage.record_heartbeat(trial._trial_id)

        thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def original_number(trial: FrozenTrial) -> int:
    """Return the number of a trial's first attempt."""
    number = RETRY.retried_trial_number(trial)
    return trial.number if number is None else number


def latest_attempts(study: optuna.Study) -> dict[int, FrozenTrial]:
    """Return the latest attempt of each trial, by the number of the first."""
    return {original_number(one): one for one in study.get_trials(deepcopy=False)}


def open_study(
    address: str, name: str, *, objectives: Mapping[str, str], sampler: BaseSampler, comparability: Mapping[str, str]
) -> SharedStudy:
    """Create a study, or continue it, in sqlite (a relative file belongs to the project's root) or Postgres.

    The comparability key has all settings and hashes that must be equal for trials to be compared.

    Raises:
        ConfigError: If the study has another comparability key.
        InputError: If the storage cannot be used.
    """
    uri = _supported(address)
    try:
        with _claim_lock(uri):
            storage = _storage(uri)
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                sampler=sampler,
                directions=[StudyDirection[direction.upper()] for direction in objectives.values()],
                load_if_exists=True,
            )
            if COMPARABILITY_KEY not in study.user_attrs:
                study.set_user_attr(COMPARABILITY_KEY, dict(comparability))
            begun_with = study.user_attrs[COMPARABILITY_KEY]
    except STORAGE_ERRORS as error:
        driver = "Install a driver and name it (prostate-seg[postgres] has that of postgresql+psycopg2://...)"
        next_step = driver if isinstance(error, ImportError) else "Check the address and who may write there"
        raise InputError(
            f"the study's storage {shown_address(uri)} cannot be used: {_first_line(error)}\n"
            f"{next_step}, or choose another: hydra.sweeper.storage=ADDRESS"
        ) from error
    _require_comparable(f"study {name} in {shown_address(uri)}", begun_with, comparability)
    return SharedStudy(study, storage, uri)


def _require_comparable(study: str, begun_with: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to continue a study that was begun with other settings or data."""
    # settings that moved to machine since the study was begun change no result
    renamed = {present_name(key): value for key, value in begun_with.items()}
    before = {key: value for key, value in renamed.items() if not key.startswith("machine.")}
    keys = sorted(before.keys() | now.keys())
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if changed:
        lines = [f"  {key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}" for key in changed[:10]]
        raise ConfigError(
            f"{study} was begun with other settings or data, and its trials cannot be compared with new ones:\n"
            + "\n".join(lines)
            + "\nContinue with the settings it was begun with, or begin another one: hydra.sweeper.study_name=NAME"
        )


def pruning_check(address: str, name: str, *, number: int, pruner: BasePruner) -> Callable[[int, float], bool]:
    """Return the function that reports a trial's progress and returns whether to prune it; for the process that trains."""
    uri = _supported(address)

    def load() -> tuple[Trial, set[int]]:
        study = optuna.load_study(study_name=name, storage=_storage(uri), pruner=pruner)
        attempt = latest_attempts(study)[number]
        return Trial(study, attempt._trial_id), set(attempt.intermediate_values)

    trial, reported = _wait_for_storage(load, uri)
    if len(trial.study.directions) > 1:  # Optuna prunes for a single objective only
        return lambda _step, _value: False

    def should_prune(step: int, value: float) -> bool:
        try:
            if step not in reported:  # before an interruption
                trial.report(value, step)
            return trial.should_prune()
        except STORAGE_ERRORS as error:
            log.warning("trial %d trains on without reporting to its study: %s", number, _first_line(error))
            return False

    return should_prune


def _has_dead_owner(trial: FrozenTrial) -> bool:
    """Return whether the process of a running trial is known to be dead; heartbeats tell for those of other machines."""
    owner = trial.user_attrs.get(OWNER)  # none if it was killed while it claimed; newer heartbeats are in the storage
    return not owner or is_alive({**owner, "process.heartbeat": now_text()}) is False


def _is_retried(trial: FrozenTrial) -> bool:
    """Return whether the next claim queues a failed trial again: its process was killed, and not too often."""
    was_killed = trial.state is TrialState.FAIL and REASON not in trial.user_attrs
    return was_killed and len(RETRY.retry_history(trial)) + 1 < MAX_ATTEMPTS


def _supported(address: str) -> str:
    uri = resolved_uri(address)
    if sqlite_file(uri) is None and not uri.startswith("postgresql"):
        shown = shown_address(uri)
        raise ConfigError(f"hydra.sweeper.storage: must be sqlite:///FILE or postgresql://..., is {shown}")
    return uri


def _storage(uri: str) -> RDBStorage:
    """Return a storage that keeps no connection open between calls: a server has few for all processes."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")
    timeout = {"timeout": SQLITE_TIMEOUT_S} if sqlite_file(uri) else {}
    return RDBStorage(
        uri,
        engine_kwargs={"connect_args": timeout, "poolclass": NullPool},
        heartbeat_interval=int(HEARTBEAT_SECONDS) or 1,
        grace_period=int(SILENT_AFTER.total_seconds()),
        heartbeat_stale_trial_callback=RETRY,
    )


@contextmanager
def _claim_lock(uri: str) -> Iterator[None]:
    """Hold the lock of all processes of a storage; the system releases that of a killed process."""
    file = sqlite_file(uri)
    if file is not None:
        if not os.access(file.parent, os.W_OK):  # the lock file would create the folder
            raise OSError(f"the folder {file.parent} does not exist or cannot be written")
        with FileLock(file.with_name(f"{file.name}.lock"), timeout=SQLITE_TIMEOUT_S):
            yield
        return
    with create_engine(uri, poolclass=NullPool).connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK_KEY})
        yield


def _first_line(error: BaseException) -> str:
    """Return the database's own message; Optuna's is a guess at the cause."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    return shown_address(first_line(cause) or type(cause).__name__)
