"""Fault injection: an MLflow server, the network in front of it, the database behind it, and a disk."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from prostate_seg.tracking.journal import journal_folders, read_lines
from tests.project_helpers import FAULTY, Project, clean_environment, free_port, until
from tests.server_helpers import FIRST_CALL, answers

MEBIBYTE = 2**20
SHORT_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "OMP_NUM_THREADS": "1"}
"""Environment with short timeouts: by default MLflow waits three times for half a minute. One thread suffices."""

TRAINING = ("stage=train", "fold.index=0", "train.max_epochs=20000", "train.steps_per_epoch=3")
"""Many short epochs; each test ends the training."""


class Server:
    """An MLflow server that can be stopped and started again, with the same database and artifacts."""

    def __init__(self, folder: Path, *, store: str | None = None) -> None:
        folder.mkdir()
        self.folder = folder
        self.store = store or f"sqlite:///{folder}/mlflow.db"
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        env = clean_environment()
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=env, start_new_session=True
            )
        until(lambda: answers(f"{self.address}/{FIRST_CALL}"), 90)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None


@contextmanager
def faulty_server(folder: Path, *, store: str | None = None) -> Iterator[Server]:
    server = Server(folder, store=store)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Network:
    """A TCP proxy for one port that can drop all data: connections stay open, and nothing arrives."""

    def __init__(self, port: int) -> None:
        self._there = ("127.0.0.1", port)
        self._carries = threading.Event()
        self._carries.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def drop_all(self) -> None:
        self._carries.clear()

    def forward(self) -> None:
        self._carries.set()

    def close(self) -> None:
        self._carries.set()
        self._listener.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(ours,), daemon=True).start()

    def _connect(self, ours: socket.socket) -> None:
        self._carries.wait()
        with suppress(OSError), ours, socket.create_connection(self._there) as theirs:
            back = threading.Thread(target=self._pump, args=(theirs, ours), daemon=True)
            back.start()
            self._pump(ours, theirs)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                self._carries.wait()
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextmanager
def network(port: int) -> Iterator[Network]:
    one = Network(port)
    try:
        yield one
    finally:
        one.close()


@contextmanager
def crashed_postgres(address: str) -> Iterator[None]:
    """Crash the Postgres server of an address, and restart it at the end of the block."""
    port = str(urlsplit(address).port)
    (main,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if port in (process.info["cmdline"] or []) and "-D" in process.info["cmdline"]
    )
    command, folder, user = main.cmdline(), main.cwd(), main.username()
    main.send_signal(signal.SIGQUIT)  # at once, as in a crash: it recovers when it starts
    until(lambda: not main.is_running() or main.status() == psutil.STATUS_ZOMBIE, 30)
    yield
    again = subprocess.Popen(
        command,
        cwd=folder,
        user=user if os.geteuid() == 0 else None,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _started_again.append(again)


_started_again: list[subprocess.Popen[bytes]] = []


def stop_restarted_postgres() -> None:
    while _started_again:
        process = _started_again.pop()
        process.send_signal(signal.SIGINT)
        process.wait(30)


@contextmanager
def small_disk(folder: Path, *, mebibytes: int = 64) -> Iterator[tuple[Path, str]]:
    """Yield a folder on a small disk of its own, and the reason if none can be mounted, else ""."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    try:
        yield folder, mounted.stderr.strip() if mounted.returncode else ""
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    """Write until the disk is full, to the last byte."""
    with file.open("wb", buffering=0) as stream:
        for size in (MEBIBYTE, 1):
            with suppress(OSError):
                while stream.write(bytes(size)):
                    pass


class TrainingMonitor:
    """Monitors a training by its journal: records written, and records acknowledged by the store."""

    def __init__(self, project: Project, process: subprocess.Popen[str]) -> None:
        self.project = project
        self.process = process

    @property
    def num_reported(self) -> int:
        return max(0, len(self._lines("records.jsonl")) - 1)

    @property
    def num_acknowledged(self) -> int:
        return max((int(line["record"]) for line in self._lines("delivered.jsonl")), default=0)

    def wait_for_records(self, *, num_records: int = 3, seconds: float = 60) -> None:
        """Wait until the training has written more records."""
        until(self._has_written(num_records), seconds)

    def wait_until_store_stops(self) -> None:
        """Wait until the store acknowledges nothing while the training continues."""
        before = -1
        while before != self.num_acknowledged:
            before = self.num_acknowledged
            self.wait_for_records(num_records=2)
            time.sleep(0.5)

    def wait_until_replicated(self, *, seconds: float = 60) -> None:
        """Wait until the store has acknowledged all records written so far."""
        wanted = self.num_reported
        until(lambda: self.num_acknowledged >= wanted, seconds)

    def _has_written(self, num_records: int) -> Callable[[], bool]:
        wanted = self.num_reported + num_records

        def has() -> bool:
            assert self.process.poll() is None, "the training has ended"
            return self.num_reported >= wanted

        return has

    def _lines(self, name: str) -> list[Mapping[str, Any]]:
        found = [folder for folder in journal_folders(self.project.folder / ".spool") if "_train_" in folder.name]
        return [line for folder in found for line in read_lines(folder / name)]


@contextmanager
def training(project: Project, address: str, *settings: str, **environment: str) -> Iterator[TrainingMonitor]:
    arguments = [*TRAINING, f"mlflow.tracking_uri={address}", *settings]
    process = project.start("none", "short-close", *arguments, program=str(FAULTY), **SHORT_TIMEOUTS, **environment)
    watch = TrainingMonitor(project, process)
    try:
        until(lambda: watch.num_acknowledged > 8 or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()[0]
        yield watch
    finally:
        process.kill()


def ended(watch: TrainingMonitor, *, code: int = 0) -> str:
    output, _ = watch.process.communicate(timeout=120)
    assert watch.process.returncode == code, output
    assert "Traceback" not in output
    return output


def is_whole(address: str, *, output: str, status: str = "FINISHED") -> Run:
    """Require that the store has the end and every logged epoch of the training, in order and once; return the fold."""
    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("prostate_seg")
    assert experiment is not None
    runs = {run.data.tags["level"]: run for run in client.search_runs([experiment.experiment_id])}
    assert {level: run.info.status for level, run in runs.items()} == dict.fromkeys(
        ("pipeline", "stage", "fold"), status
    )
    points = client.get_metric_history(runs["fold"].info.run_id, "train/loss")
    shown = {int(epoch): float(loss) for epoch, loss in re.findall(r"^   0 +(\d+) +([\d.]+) ", output, re.MULTILINE)}
    assert [point.step for point in points] == list(range(1, len(points) + 1))
    if status == "FINISHED":
        assert len(points) == runs["fold"].data.metrics["train/num_epochs"]
    told = {point.step: point.value for point in points}
    assert {epoch: told[epoch] for epoch in shown} == pytest.approx(shown, abs=1e-4)
    assert [point.timestamp for point in points] == sorted(point.timestamp for point in points)
    return runs["fold"]
