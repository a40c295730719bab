"""A server that is slow to answer, or to let people in, is used; one that does not even say that it is well is not."""

import json
import sqlite3
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

from prostate_seg.errors import InputError
from prostate_seg.tracking import store
from tests.test_run_tree import SETTINGS

EXPERIMENT = {"experiment": {"experiment_id": "7", "name": "prostate_seg", "lifecycle_stage": "active"}}


@contextmanager
def busy_server(*, seconds: float = 0.0, is_well: bool = True, num_refusals: int = 0) -> Iterator[str]:
    """A tracking server that takes its time for every question, and for the one after its health unless it is well.

    The first of those who ask for the experiment may not see it.
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
def _less_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECONDS_TO_ANSWER", 1.0)


def test_busy_server_that_is_well_is_waited_for(tmp_path: Path) -> None:
    with busy_server(seconds=2.5, is_well=True) as address:
        opened = store.open_store(replace(SETTINGS, tracking_uri=address), cache=tmp_path)
    assert opened.experiment_id == "7"


def test_server_that_is_silent_is_not_waited_for(tmp_path: Path) -> None:
    with busy_server(seconds=30, is_well=False) as address, pytest.raises(InputError, match="no answer within 1 s"):
        store.open_store(replace(SETTINGS, tracking_uri=address), cache=tmp_path)


@pytest.mark.parametrize("is_locked", [False, True])
def test_busy_file_is_waited_for_unless_another_program_holds_it(
    is_locked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mlflow.db"
    store.open_store(replace(SETTINGS, tracking_uri=f"sqlite:///{file}"), cache=tmp_path)
    find = store._experiment

    def find_slowly(client: MlflowClient, name: str) -> Experiment | None:
        if is_locked:
            holder.execute("BEGIN IMMEDIATE")
        time.sleep(2.5)
        return find(client, name)

    monkeypatch.setattr(store, "_experiment", find_slowly)
    outcome = pytest.raises(InputError, match="no answer within 1 s") if is_locked else nullcontext()
    with closing(sqlite3.connect(file, check_same_thread=False)) as holder, outcome:
        store.open_store(replace(SETTINGS, tracking_uri=f"sqlite:///{file}"), cache=tmp_path)


def test_experiment_that_another_process_has_just_made_is_seen_once_its_maker_may(tmp_path: Path) -> None:
    with busy_server(num_refusals=2) as address:
        opened = store.open_store(replace(SETTINGS, tracking_uri=address), cache=tmp_path)
    assert opened.experiment_id == "7"


def test_experiment_that_stays_hidden_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECONDS_TO_BE_LET_IN", 0.2)
    with busy_server(num_refusals=1000) as address, pytest.raises(InputError, match="403"):
        store.open_store(replace(SETTINGS, tracking_uri=address), cache=tmp_path)
