"""Connection to the tracking store, and messages for a store that cannot be used.

Such a store stops a run before its stage starts, within ten seconds, with its address and the next step.
"""

import errno
import logging
import os
import re
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import mlflow
import requests
from filelock import BaseFileLock, FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.telemetry import set_telemetry_client
from sqlalchemy.exc import SQLAlchemyError

from prostate_seg.common.address import resolved_uri, shown_address, sqlite_file
from prostate_seg.common.errors import InputError, first_line
from prostate_seg.common.files import atomic_path
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.tracking import set_mlflow_defaults
from prostate_seg.tracking.store.paths import require_own_paths

SECONDS_TO_ANSWER = 6.0
"""Timeout of a call; the documentation promises ten seconds in all."""
BUSY_SECONDS = 90.0
"""Timeout of a call to a healthy store: it may be busy."""
SECONDS_TO_BE_LET_IN = 2.0
"""A server with users shows a new experiment to its creator with a delay of up to this."""
CREATING_SECONDS = 120.0
"""Timeout of creating the tables of a new database file."""

DELETED_EXPERIMENT = "its experiment"
"""Begin of the error for an experiment in MLflow's trash."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Opens MLflow's page with runs and curves rather than with traces of language models."""

STORE_ERRORS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)
"""Errors of a failing store; a TimeoutError is an OSError."""
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Error codes of MLflow for an id or alias that does not exist, or that none can have."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """An open store."""

    client: MlflowClient
    experiment_id: str
    address: str
    """For people: without user and password."""
    lock: BaseFileLock
    """Held while parents are found or created."""
    is_server: bool
    """Whether processes on other machines, which do not share the lock, may use it."""

    def call(self, function: Callable[[], Result], *, locked: bool = False) -> Result:
        """Return what a function that uses the client returns; with `locked`, the lock is held meanwhile.

        Raises:
            InputError: If the store fails, or takes too long to answer.
        """
        with self.explained_errors(), self.lock if locked else nullcontext():
            return _with_timeout(function, address=self.address, seconds=SECONDS_TO_ANSWER)

    def explained_errors(self) -> AbstractContextManager[None]:
        """Return a context that raises errors of the store as InputErrors with the next step."""
        return explained_errors(self.address)


def open_store(settings: MlflowConfig, *, cache: Path) -> Store:
    """Connect, and find or create the experiment; the lock of a store that is no local file is in `cache`.

    Raises:
        InputError: If the store cannot be reached, read or written, or its paths are those of another folder.
    """
    assert settings.tracking_uri is not None
    _quiet()
    uri = resolved_uri(settings.tracking_uri)
    address = shown_address(uri)
    file = sqlite_file(uri)
    with explained_errors(address):
        _require_reachable(uri)
        if file is None:
            cache.mkdir(parents=True, exist_ok=True)
        lock = lock_of(file or cache / "mlflow")
        with lock:
            if file is not None and not file.exists():
                _with_timeout(partial(_create_database, uri, file), address=address, seconds=CREATING_SECONDS)
            if file is not None:
                require_own_paths(file, experiment=settings.experiment)
            connect = partial(_client_and_experiment, uri, settings.experiment, file)
            client, experiment_id = _with_timeout(connect, address=address, seconds=SECONDS_TO_ANSWER)
    return Store(client=client, experiment_id=experiment_id, address=address, lock=lock, is_server=file is None)


def lock_of(file: Path) -> BaseFileLock:
    """Return the lock shared by the processes that create parents in a store."""
    return FileLock(file.with_name(f"{file.name}.lock"), timeout=CREATING_SECONDS)


@contextmanager
def explained_errors(address: str, *, note: str = "") -> Iterator[None]:
    """Raise errors of a store as InputErrors with the next step, and a note after it."""
    try:
        yield
    except STORE_ERRORS as error:
        other = "choose another store: mlflow=server, mlflow.tracking_uri=ADDRESS, or mlflow=off"
        raise InputError(
            f"the tracking store {address} cannot be used: {_reason(error)}\n{_next_step(error, address)}, or {other}{note}"
        ) from error


def _create_database(uri: str, file: Path) -> None:
    """Create the tables in a temporary file first: a killed process leaves no incomplete database."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # a server's client needs neither

    with atomic_path(file) as temporary:
        temporary_uri = uri.replace(file.as_posix(), temporary.as_posix())
        SqlAlchemyStore(temporary_uri, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()


def _client_and_experiment(uri: str, name: str, file: Path | None) -> tuple[MlflowClient, str]:
    client = MlflowClient(tracking_uri=uri)
    found = _experiment(client, name)
    if found is None:
        try:
            artifacts = (file.parent / "mlruns" / re.sub(r"[^\w.\-]", "_", name)).as_uri() if file else None
            return client, client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = _experiment(client, name)  # created by another host just now
    assert found is not None
    if found.lifecycle_stage != "active":
        raise MlflowException(f"{DELETED_EXPERIMENT} {name!r} is deleted (id {found.experiment_id})")
    return client, str(found.experiment_id)


def _experiment(client: MlflowClient, name: str) -> Experiment | None:
    """Find an experiment; wait for permission to read one that was created just now."""
    end = time.monotonic() + SECONDS_TO_BE_LET_IN
    while True:
        try:
            return client.get_experiment_by_name(name)
        except MlflowException as error:
            if error.error_code != "PERMISSION_DENIED" or time.monotonic() > end:
                raise
        time.sleep(SECONDS_TO_BE_LET_IN / 10)


def _require_reachable(uri: str) -> None:
    """Check that the file can be written, or that the port is open: these errors are clearer than MLflow's."""
    file = sqlite_file(uri)
    if file is not None:
        _require_writable(file)
        return
    parts = urlsplit(uri)
    port = parts.port or {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}.get(parts.scheme.split("+")[0])
    if parts.hostname and port:
        with socket.create_connection((parts.hostname, port), timeout=SECONDS_TO_ANSWER / 2):
            pass
    elif not parts.scheme or parts.scheme == "file":
        raise OSError("a folder cannot be a store since MLflow 3.13; use sqlite:///FILE")


def _require_writable(file: Path) -> None:
    if not file.parent.is_dir():
        raise OSError(f"the folder {file.parent} does not exist")
    if not os.access(file.parent, os.W_OK):
        raise OSError(f"the folder {file.parent} cannot be written")
    if file.exists():
        with closing(sqlite3.connect(file, timeout=SECONDS_TO_ANSWER / 2)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()


def _with_timeout(function: Callable[[], Result], *, address: str, seconds: float) -> Result:
    """Return the result of a function, or raise TimeoutError; its thread is a daemon, which delays no exit."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again in the caller's thread
            future.set_exception(error)

    end = time.monotonic() + seconds
    threading.Thread(target=run, daemon=True, name="store").start()
    wait([future], seconds / 2)
    if not future.done() and _is_healthy(address, timeout=seconds / 2):
        seconds = BUSY_SECONDS
        end += BUSY_SECONDS
    wait([future], max(0.0, end - time.monotonic()))
    if not future.done():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return future.result()


def _is_healthy(address: str, *, timeout: float) -> bool:
    """Return whether a server's /health answers, or a file can be written: a busy store is not a failing one."""
    file = sqlite_file(address)
    try:
        if file is not None:
            _require_writable(file)
            return True
        is_http = urlsplit(address).scheme in {"http", "https"}
        return is_http and requests.get(f"{address.rstrip('/')}/health", timeout=timeout).status_code < 500
    except (OSError, sqlite3.Error):  # an error of requests is an OSError
        return False


def _reason(error: BaseException) -> str:
    text = str(error.__cause__ or error) if isinstance(error, SQLAlchemyError) else str(error)
    text = re.sub(r"\. Take a backup of your database, .*", "", text)  # may be wrong: see _advice_on_version
    return shown_address(first_line(text.strip() or error))


def _next_step(error: BaseException, address: str) -> str:
    text = str(error)
    if "out-of-date" in text or "Can't locate revision" in text:
        return _advice_on_version(text, address)
    if deleted := re.search(rf"{DELETED_EXPERIMENT} .* is deleted \(id (\w+)\)", text):
        command = f"MLFLOW_TRACKING_URI={address} mlflow experiments restore --experiment-id {deleted[1]}"
        return f"Restore it ({command}, or on the MLflow page), name another mlflow.experiment"
    if "_alembic_tmp" in text:
        return "A program was killed while it changed its tables: move the file away, or put back a backup"
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "disk is full" in text:
        return f"Free some space beside it, and in {tempfile.gettempdir()} (TMPDIR), and start again"
    if "locked" in text:
        return "Close what holds it and start again"
    if isinstance(error, (TimeoutError, ConnectionError, socket.gaierror)):
        return "Start the server, or check the address"
    return "Check the address and who may write there"


def _advice_on_version(text: str, address: str) -> str:
    """Return which of database and MLflow is older, by the order of MLflow's migrations, and the command to run."""
    newest_first = _migrations()
    named = re.findall(r"(?:found|expected) (?:version )?(\w+)", text)
    ages = [newest_first.index(name) if name in newest_first else None for name in named]
    upgrade_mlflow = "pip install --upgrade mlflow"
    if ages == [None, None]:
        return (
            f"The server's MLflow is newer than the one here ({mlflow.__version__}). On the server, if the database is the "
            f"older one: mlflow db upgrade; if MLflow is: {upgrade_mlflow}"
        )
    found, expected = ages or (None, None)
    if found is not None and (expected is None or found > expected):
        return f"The database is older than MLflow. Back it up and run: mlflow db upgrade {address}"
    return (
        f"The database is newer than the MLflow that reads it (here: {mlflow.__version__}), and must not be changed. "
        f"Upgrade MLflow there: {upgrade_mlflow}"
    )


def _migrations() -> list[str]:
    """Return the database revisions of the installed MLflow, newest first."""
    from alembic.script import ScriptDirectory  # needed for this error alone

    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    return [script.revision for script in scripts.walk_revisions()]


def _quiet() -> None:
    """Silence the libraries' notes about tables, migrations and failures, which are raised, too."""
    set_mlflow_defaults()
    set_telemetry_client()  # reads the defaults again, in case MLflow was imported before
    levels = {"mlflow": logging.WARNING, "alembic": logging.WARNING, "urllib3": logging.ERROR}
    for name, level in {**levels, "mlflow.store.db.utils": logging.CRITICAL}.items():
        logging.getLogger(name).setLevel(level)
