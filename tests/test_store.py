"""A server that is slow to answer is used; one that does not even say that it is well is not."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from prostate_seg.errors import InputError
from prostate_seg.tracking import store
from tests.test_run_tree import SETTINGS

EXPERIMENT = {"experiment": {"experiment_id": "7", "name": "prostate_seg", "lifecycle_stage": "active"}}


@contextmanager
def busy_server(*, seconds: float, is_well: bool) -> Iterator[str]:
    """A tracking server that takes its time for every question, and for the one after its health unless it is well."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not (is_well and self.path == "/health"):
                time.sleep(seconds)
            body = json.dumps(EXPERIMENT).encode()
            self.send_response(200)
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
