"""A slow server, or one that grants permissions late, is used; one whose health check fails is not."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from mlflow import MlflowClient
from mlflow.entities import Experiment

from prostate_seg.common.errors import InputError
from prostate_seg.tracking import set_mlflow_defaults
from prostate_seg.tracking.store import connection as store
from tests.test_run_tree import SETTINGS

EXPERIMENT = {"experiment": {"experiment_id": "7", "name": "prostate_seg", "lifecycle_stage": "active"}}


@contextmanager
def busy_server(*, seconds: float = 0.0, is_well: bool = True, num_refusals: int = 0) -> Iterator[str]:
    """A tracking server with a delay of every response, and of /health unless it is healthy.

    The first requests of the experiment have no permission.
    """
    refusals = iter(range(num_refusals))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not (is_well and self.path == "/health"):
                time.sleep(seconds)
            is_refused = "get-by-name" in self.path and next(refusals, None) is not None
            body = b"Permission denied" if is_refused else json.dumps(EXPERIMENT).encode()
            self.send_response(403 if is_refused else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECONDS_TO_ANSWER", 1.0)


def test_busy_but_healthy_server_gets_a_longer_timeout(tmp_path: Path) -> None:
    with busy_server(seconds=2.5, is_well=True) as address:
        opened = store.open_store(replace(SETTINGS, tracking_uri=address), cache=tmp_path)
    assert opened.experiment_id == "7"


def test_unhealthy_server_gets_no_longer_timeout(tmp_path: Path) -> None:
    with busy_server(seconds=30, is_well=False) as address, pytest.raises(InputError, match="no answer within 1 s"):
        store.open_store(replace(SETTINGS, tracking_uri=address), cache=tmp_path)


@pytest.mark.parametrize("is_locked", [False, True])
def test_busy_file_gets_a_longer_timeout_unless_it_is_locked(
    is_locked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mlflow.db"
    store.open_store(replace(SETTINGS, tracking_uri=f"sqlite:///{file}"), cache=tmp_path)
    find = store._experiment

    def find_late(client: MlflowClient, name: str) -> Experiment | None:
        if is_locked:
            holder.execute("BEGIN IMMEDIATE")
        time.sleep(2.5)
        return find(client, name)

    monkeypatch.setattr(store, "_experiment", find_late)
    outcome = pytest.raises(InputError, match="no answer within 1 s") if is_locked else nullcontext()
    with closing(sqlite3.connect(file, check_same_thread=False)) as holder, outcome:
        store.open_store(replace(SETTINGS, tracking_uri=f"sqlite:///{file}"), cache=tmp_path)


def test_experiment_created_by_another_process_is_used_once_it_is_visible(tmp_path: Path) -> None:
    with busy_server(num_refusals=2) as address:
        opened = store.open_store(replace(SETTINGS, tracking_uri=address), cache=tmp_path)
    assert opened.experiment_id == "7"


def test_experiment_that_stays_hidden_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECONDS_TO_BE_LET_IN", 0.2)
    with busy_server(num_refusals=1000) as address, pytest.raises(InputError, match="403"):
        store.open_store(replace(SETTINGS, tracking_uri=address), cache=tmp_path)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.open_store(replace(SETTINGS, tracking_uri=f"sqlite:///{file}"), cache=file.parent)
    return file


def refusal(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        store.open_store(replace(SETTINGS, tracking_uri=f"sqlite:///{file}"), cache=file.parent)
    return str(caught.value)


def explained(error: Exception) -> str:
    with pytest.raises(InputError) as caught, store.explained_errors("http://host:5000"):
        raise error
    return str(caught.value)


@pytest.mark.parametrize("age", ["newer", "older"])
def test_database_of_another_version_is_refused_with_the_upgrade_command(
    age: str, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SECONDS_TO_ANSWER", 6.0)
    file = Path(shutil.copy(database, tmp_path / "mlflow.db"))
    with closing(sqlite3.connect(file)) as connection:
        revision = store._migrations()[1] if age == "older" else "0123456789ab"
        connection.execute("UPDATE alembic_version SET version_num = ?", [revision])
        connection.commit()
    text = refusal(file)
    if age == "older":
        assert f"is older than MLflow. Back it up and run: mlflow db upgrade sqlite:///{file}" in text
        assert "--upgrade mlflow" not in text
    else:
        assert "is newer than the MLflow that reads it" in text
        assert "pip install --upgrade mlflow" in text
        assert "db upgrade" not in text


@pytest.mark.parametrize(
    ("found", "expected", "advice"),
    [
        (1, 0, "The database is older"),
        (0, 1, "The database is newer"),
        (0, None, "The database is older"),
        (None, 0, "The database is newer"),
        (None, None, "On the server"),
    ],
)
def test_advice_for_a_server_follows_the_order_of_migrations(
    found: int | None, expected: int | None, advice: str
) -> None:
    known = store._migrations()
    names = ["unknown" if place is None else known[place] for place in (found, expected)]
    error = store.MlflowException(
        f"API request failed: Detected out-of-date database schema (found version {names[0]}, but expected {names[1]}). "
        "Take a backup of your database, then run 'mlflow db upgrade <database_uri>'"
    )
    assert advice in explained(error)


def test_revision_that_alembic_does_not_know_means_a_newer_database() -> None:
    error = store.MlflowException("Can't locate revision identified by '0123456789ab'")
    assert "pip install --upgrade mlflow" in explained(error)


def test_deleted_experiment_is_refused_with_the_command_that_restores_it(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SECONDS_TO_ANSWER", 6.0)
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiment = client.get_experiment_by_name(SETTINGS.experiment)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    text = refusal(database)
    client.restore_experiment(experiment.experiment_id)
    assert f"its experiment '{SETTINGS.experiment}' is deleted" in text
    command = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
    assert f"MLFLOW_TRACKING_URI=sqlite:///{database} {command}" in text
    assert "name another mlflow.experiment" in text


IMPORTS = """
import importlib, logging, os, pkgutil
import mlflow, optuna, mlflow.system_metrics.system_metrics_monitor, alembic, dvc_data.hashfile.build, hydra.main
import prostate_seg.sweeping, prostate_seg.tracking, prostate_seg.tracking.store
before = dict(os.environ), {name: logging.getLogger(name).level for name in ("optuna", "mlflow", "alembic", "urllib3")}
for package in (prostate_seg.sweeping, prostate_seg.tracking, prostate_seg.tracking.store):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
after = dict(os.environ), {name: logging.getLogger(name).level for name in ("optuna", "mlflow", "alembic", "urllib3")}
assert before == after, [set(a.items()) ^ set(b.items()) for a, b in zip(before, after)]
"""


def test_importing_the_modules_of_tracking_and_sweeps_changes_no_variable_and_no_level() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_defaults_of_mlflow_keep_variables_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    set_mlflow_defaults()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
