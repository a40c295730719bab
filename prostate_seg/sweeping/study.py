"""An Optuna study that any number of processes work on: who has which trial, which trials were orphaned, what each came to.

A trial is claimed under a lock that all processes of the store see, and carries the process that has it. A process that was
killed leaves its trial RUNNING; the next claim takes that trial over, with its number and settings. So a study never holds
more trials than were asked for. A storage that is away for a while is waited for. The whole of Optuna is imported here.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GridSampler
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from prostate_seg.common.address import resolved_uri, shown_address, sqlite_file
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.operations.process import HEARTBEAT_SECONDS, SILENT_AFTER, is_alive, is_silent, this_process
from prostate_seg.sweeping.pruning import IsHopeless

log = logging.getLogger(__name__)

MOST_DEATHS = 4
"""A trial whose process has died this often is taken to be the reason, as one that needs more memory than there is."""
LOCK_KEY = 20_260_118
"""Names the lock of studies inside a Postgres database."""
SECONDS_TO_WRITE = 60
"""How long one who needs a sqlite file waits for the others."""
SECONDS_TO_COME_BACK = 300.0
"""How long a storage that was there before may be away; what trials have trained lies on disk."""
SECONDS_BETWEEN_TRIES = 2.0

STORAGE_ERRORS = (SQLAlchemyError, StorageInternalError, OSError, ImportError)
"""What a storage raises that cannot be used; ImportError where the driver of its database is not installed."""

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


def _waited_for(ask: Callable[[], Answer], uri: str) -> Answer:
    """Return what a storage answers, which may be away for a while; asking it twice does no harm.

    Raises:
        InputError: If it does not come back.
    """
    end, is_told = time.monotonic() + SECONDS_TO_COME_BACK, False
    while True:
        try:
            return ask()
        except STORAGE_ERRORS as error:
            away = f"the study's storage {shown_address(uri)} is away: {_line(error)}"
            if time.monotonic() > end:
                raise InputError(
                    f"{away}\nWhat was trained is kept: once it is back, the same command goes on"
                ) from error
            if not is_told:
                log.warning("%s\nIt is waited for, %.0f s at most", away, SECONDS_TO_COME_BACK)
                is_told = True
        time.sleep(SECONDS_BETWEEN_TRIES)


def _patient(
    method: Callable[Concatenate["SharedStudy", Asked], Answer],
) -> Callable[Concatenate["SharedStudy", Asked], Answer]:
    """Let a method wait for its storage."""

    @wraps(method)
    def ask(self: "SharedStudy", /, *args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
        return _waited_for(partial(method, self, *args, **kwargs), self._uri)

    return ask


class SharedStudy:
    """The trials of one study; its methods raise an InputError when the storage stays away."""

    def __init__(self, study: optuna.Study, uri: str) -> None:
        self.study = study
        self._uri = uri

    @_patient
    def claim(self, *, num_trials: int, at_most: int) -> list[Trial]:
        """Return trials for this process to run: orphaned ones first, then new ones until the study has `num_trials`."""
        with _locked(self._uri):
            claimed = self._orphans()[:at_most]
            for trial in claimed:
                trial.set_user_attr("deaths", _deaths(trial))
            num_begun = sum(one.state is not TrialState.WAITING for one in self._all())
            claimed += [self.study.ask() for _ in range(min(at_most - len(claimed), num_trials - num_begun))]
            for trial in claimed:
                trial.set_user_attr("owner", this_process().as_tags())
        return claimed

    @_patient
    def take_back(self, trials: Sequence[Trial]) -> None:
        """Let trials be claimed again whose job's process has died."""
        for trial in trials:
            trial.set_user_attr("owner", {"process.died": "true"})

    def give_back(self, trials: Sequence[Trial]) -> None:
        """Let trials be claimed again because a person or scheduler stops this process; its end does that too, but later."""
        with suppress(*STORAGE_ERRORS):
            for trial in trials:
                trial.set_user_attr("owner", {})

    @_patient
    def is_anything_running(self) -> bool:
        """Return whether another process still works on a trial."""
        return any(one.state is TrialState.RUNNING for one in self._all())

    @_patient
    def suggest(self, trial: Trial, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """Return the settings of a trial; those that it had before it was orphaned stay."""
        return {name: trial._suggest(name, distribution) for name, distribution in space.items()}

    @_patient
    def complete(self, trial: Trial, values: Sequence[float]) -> None:
        """Record what a trial came to."""
        self._tell(trial, TrialState.COMPLETE, values)

    @_patient
    def prune(self, trial: Trial) -> None:
        """Record that a trial was stopped early."""
        self._tell(trial, TrialState.PRUNED)

    @_patient
    def fail(self, trial: Trial, reason: str) -> None:
        """Record that a trial gave no result."""
        trial.set_user_attr("reason", reason)
        self._tell(trial, TrialState.FAIL)

    @_patient
    def counts(self) -> dict[str, int]:
        """Return the number of trials by state."""
        states = [one.state.name for one in self._all()]
        return {state.name: states.count(state.name) for state in TrialState}

    @_patient
    def best(self) -> list[FrozenTrial]:
        """Return the best trial; of several objectives all that no other beats in each; empty when none has finished."""
        return self.study.best_trials if self.counts()["COMPLETE"] else []

    @_patient
    def last_reason(self) -> str:
        """Return why the newest failed trial has failed."""
        return next((str(one.user_attrs["reason"]) for one in reversed(self._all()) if "reason" in one.user_attrs), "")

    @contextmanager
    def kept_alive(self, trials: Sequence[Trial]) -> Iterator[None]:
        """Let trials give a sign of life while their jobs run, for those who look from other machines."""
        is_over = threading.Event()

        def beat() -> None:
            while not is_over.wait(HEARTBEAT_SECONDS):
                with suppress(*STORAGE_ERRORS):  # the next one may get through
                    for trial in trials:
                        trial.set_user_attr("owner", this_process().as_tags())

        thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _orphans(self) -> list[Trial]:
        """Return the running trials that no process has, but for those whose processes keep dying; these fail."""
        found = []
        for one in self._all():
            if one.state is TrialState.RUNNING and not _is_owned(one):
                trial = Trial(self.study, one._trial_id)
                if _deaths(trial) < MOST_DEATHS:
                    found.append(trial)
                else:
                    self.fail(trial, f"its process died {_deaths(trial)} times, as when memory is short")
        return found

    def _tell(self, trial: Trial, state: TrialState, values: Sequence[float] | None = None) -> None:
        try:
            self.study.tell(trial, values, state, skip_if_finished=True)
        except (
            RuntimeError
        ):  # the state is stored; a grid that is used up tells Optuna's own loop, which is not ours, to end
            if not isinstance(self.study.sampler, GridSampler):
                raise


def open_study(
    address: str, name: str, *, objectives: Mapping[str, str], sampler: BaseSampler, question: Mapping[str, str]
) -> SharedStudy:
    """Make a study, or go on with it.

    Args:
        address: Its storage: sqlite, where a relative file lies in the project's root, or Postgres.
        name: Its name in there.
        objectives: What is sought, with its direction.
        sampler: Proposes settings.
        question: All that must be the same for trials to be compared.

    Raises:
        ConfigError: If the study was begun with another question.
        InputError: If the storage cannot be used.
    """
    uri = _supported(address)
    try:
        _require_folder(uri)
        with _locked(uri):
            study = optuna.create_study(
                storage=_storage(uri),
                study_name=name,
                sampler=sampler,
                directions=[StudyDirection[direction.upper()] for direction in objectives.values()],
                load_if_exists=True,
            )
            begun_with = study.user_attrs.get("question")
            if begun_with is None:
                study.set_user_attr("question", dict(question))
    except STORAGE_ERRORS as error:
        raise InputError(_unusable(uri, error)) from error
    if begun_with is not None:
        _require_same(begun_with, question, where=f"study {name} in {shown_address(uri)}")
    return SharedStudy(study, uri)


def judge(address: str, name: str, *, number: int, pruner: BasePruner) -> IsHopeless:
    """Return what tells the study how a trial stands and asks the pruner; it runs in the process that trains."""
    uri = _supported(address)

    def look() -> tuple[Trial, set[int]]:
        study = optuna.load_study(study_name=name, storage=_storage(uri), pruner=pruner)
        trial = Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)
        return trial, set(trial.storage.get_trial(trial._trial_id).intermediate_values)  # before an interruption

    trial, told = _waited_for(look, uri)
    if len(trial.study.directions) > 1:  # Optuna prunes for one objective only
        return lambda _step, _value: False

    def is_hopeless(step: int, value: float) -> bool:
        try:
            if step not in told:
                trial.report(value, step)
            return trial.should_prune()
        except STORAGE_ERRORS as error:
            log.warning("trial %d trains on, and its study is not told how it stands: %s", number, _line(error))
            return False

    return is_hopeless


def _deaths(orphan: Trial) -> int:
    """Return how often a trial's process has died: one that was told to stop has given its trial back."""
    return int(orphan.user_attrs.get("deaths", 0)) + bool(orphan.user_attrs.get("owner"))


def _is_owned(trial: FrozenTrial) -> bool:
    """Return whether the process that has a trial lives; one of another machine counts as dead when it is silent."""
    owner = trial.user_attrs.get("owner", {})
    alive = is_alive(owner)
    return not is_silent(owner, since=SILENT_AFTER) if alive is None else alive


def _require_same(begun_with: Mapping[str, str], question: Mapping[str, str], *, where: str) -> None:
    keys = sorted(begun_with.keys() | question.keys())
    changed = [key for key in keys if begun_with.get(key) != question.get(key)]
    if changed:
        lines = [f"  {key}: {begun_with.get(key, 'absent')} -> {question.get(key, 'absent')}" for key in changed[:10]]
        raise ConfigError(
            f"{where} was begun with other settings or data, and its trials cannot be compared with new ones:\n"
            + "\n".join(lines)
            + "\nGo on with what it was begun with, or begin another one: hydra.sweeper.study_name=NAME"
        )


def _supported(address: str) -> str:
    uri = resolved_uri(address)
    if sqlite_file(uri) is None and not uri.startswith("postgresql"):
        shown = shown_address(uri)
        raise ConfigError(f"hydra.sweeper.storage: must be sqlite:///FILE or postgresql://..., is {shown}")
    return uri


def _require_folder(uri: str) -> None:
    """Refuse a file in a folder that does not exist: the lock beside it would make the folder."""
    file = sqlite_file(uri)
    if file is not None and not os.access(file.parent, os.W_OK):
        raise OSError(f"the folder {file.parent} does not exist or cannot be written")


def _storage(uri: str) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    """Return a storage that holds no connection between two questions: a server has few for all who search."""
    waiting = {"timeout": SECONDS_TO_WRITE} if sqlite_file(uri) else {}
    return RDBStorage(uri, engine_kwargs={"connect_args": waiting, "poolclass": NullPool})


@contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Hold the lock of all who use a storage; the system takes it from a process that dies."""
    file = sqlite_file(uri)
    if file is not None:
        with FileLock(file.with_name(f"{file.name}.lock"), timeout=SECONDS_TO_WRITE):
            yield
        return
    with create_engine(uri, poolclass=NullPool).connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK_KEY})
        yield


def _unusable(uri: str, error: BaseException) -> str:
    driver = "Install a driver and name it (prostate-seg[postgres] has that of postgresql+psycopg2://...)"
    next_step = driver if isinstance(error, ImportError) else "Check the address and who may write there"
    return (
        f"the study's storage {shown_address(uri)} cannot be used: {_line(error)}\n"
        f"{next_step}, or choose another: hydra.sweeper.storage=ADDRESS"
    )


def _line(error: BaseException) -> str:
    """Return what a database says is wrong, which Optuna words as a guess of its own."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    return shown_address(next(iter(str(cause).splitlines()), type(cause).__name__))
