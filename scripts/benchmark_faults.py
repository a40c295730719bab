"""Measure the effect of a failing store on a training: `python scripts/benchmark_faults.py [--seconds 30] [--rounds 1]`.

The store of one training, in this process, alternates between available and failing, in periods of equal length. For each
period the median time of an epoch of one step, of the call that records it, and the fraction of a core that the replication
thread uses are measured. The last two hardly depend on the load of the machine. At the end the metric points in the store are
compared with the recorded ones, before and after stage=sync.
"""

import argparse
import contextlib
import json
import os
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmark_training import benchmark_config, pack_noise, train  # noqa: E402

from prostate_seg.config.schema import Config  # noqa: E402
from prostate_seg.config.workspace import StageResult, workspace_of  # noqa: E402
from prostate_seg.operations.job import Job, Outcome  # noqa: E402
from prostate_seg.segmentation.training.packing import PackedSet  # noqa: E402
from tests.fault_helpers import (  # noqa: E402
    Server,
    crashed_postgres,
    faulty_server,
    fill,
    network,
    small_disk,
    stop_restarted_postgres,
)
from tests.server_helpers import postgres_server, why_no_postgres  # noqa: E402

Fault = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Turn:
    """A period of training with the store available or failing."""

    epochs: list[float]
    """Seconds of each epoch."""
    calls: list[float]
    """Seconds of each call that records an epoch."""
    writer: float
    """Fraction of a core that the replication thread uses."""


def main() -> None:
    """Print a row per fault, and all of them as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    cfg = benchmark_config("model.channels=[8,16]", "model.strides=[[2,2]]")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        packed = pack_noise(Path(name) / "packed", num_cases=20)
        for number, fault in enumerate(given.faults):
            folder = Path(name) / f"fault{number}"
            folder.mkdir()
            os.chdir(folder)
            rows.append({"fault": fault, **_measured(cfg, packed, FAULTS[fault], folder, given.seconds, given.rounds)})
            print(json.dumps(rows[-1]), flush=True)
            os.chdir(ROOT)
    if given.output:
        given.output.write_text(json.dumps(rows, indent=1))


def _measured(
    cfg: Config,
    packed: PackedSet,
    place: Callable[[Path], AbstractContextManager[tuple[str, Fault]]],
    folder: Path,
    seconds: float,
    rounds: int,
) -> dict[str, object]:
    with place(folder) as (address, fault):
        cfg = replace(cfg, stage="train", mlflow=replace(cfg.mlflow, tracking_uri=address))
        turns, reported, kept = _trained(cfg, packed, fault, seconds, rounds)
        there = _points(address)
        _sync(cfg)
        after = _points(address)
    well, failing = turns[0::2], turns[1::2]
    return {
        "seconds": seconds,
        "times": len(failing),
        "epoch_ms": [_median_ms([turn.epochs for turn in some]) for some in (well, failing)],
        "call_ms": [_median_ms([turn.calls for turn in some]) for some in (well, failing)],
        "writer_percent_of_a_core": [
            round(100 * statistics.mean(turn.writer for turn in some), 2) for some in (well, failing)
        ],
        "epochs": reported,
        "on_disk_at_the_end": kept,
        "in_store_at_the_end": len(there),
        "in_store_after_sync": len(after),
        "lost": reported - len(set(after)),
        "twice": len(after) - len(set(after)),
        "in_order": after == sorted(after),
    }


def _trained(cfg: Config, packed: PackedSet, fault: Fault, seconds: float, rounds: int) -> tuple[list[Turn], int, int]:
    """Train for an odd number of turns; return them, the number of epochs and of unacknowledged records."""
    from prostate_seg.tracking.journal import pending_journals
    from prostate_seg.tracking.tracked_run import TrackedRun

    job = Job(overrides=(), output_dir=Path(), hydra_dir=".hydra", sweep_folder=None, number=None)
    run = TrackedRun(cfg, workspace_of(cfg), job)
    turns: list[Turn] = []
    epochs: list[float] = []
    calls: list[float] = []
    number = 0
    failing = ExitStack()
    with contextlib.suppress(StopIteration), run.open_fold(0) as fold:
        mark, began, writer = time.perf_counter(), time.perf_counter(), _writer_seconds()

        def after_epoch(_: object) -> None:
            nonlocal mark, began, writer, epochs, calls, number
            number += 1
            start = time.perf_counter()
            fold.on_epoch_end(number, {"train/loss": 1 / number, "learning_rate": 1e-3, "seconds": 1.0})
            calls.append(time.perf_counter() - start)
            epochs.append(time.perf_counter() - mark)
            if time.perf_counter() - began >= seconds:
                used = (_writer_seconds() - writer) / (time.perf_counter() - began)
                turns.append(Turn(epochs=epochs, calls=calls, writer=used))
                failing.close()
                if len(turns) == 2 * rounds + 1:
                    raise StopIteration
                if len(turns) % 2 == 1:
                    failing.enter_context(fault())
                epochs, calls, began, writer = [], [], time.perf_counter(), _writer_seconds()
            mark = time.perf_counter()

        train(cfg, packed, num_steps=1, num_epochs=100_000, on_epoch_end=after_epoch)
    run.finish(StageResult())
    run.close(Outcome.killed)
    kept = sum(found.num_records for found in pending_journals(Path(cfg.paths.journal)))
    return turns, number, kept


def _median_ms(turns: list[list[float]]) -> float:
    return round(1000 * statistics.median(one for turn in turns for one in turn), 3)


def _writer_seconds() -> float:
    """Return the processor time of the replication thread."""
    ids = {thread.native_id for thread in threading.enumerate() if thread.name == "mlflow replication"}
    return sum(one.user_time + one.system_time for one in psutil.Process().threads() if one.id in ids)


def _points(address: str) -> list[int]:
    """Return the epochs in the store, in its order."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("prostate_seg")
    assert experiment is not None
    (fold,) = client.search_runs([experiment.experiment_id], "tags.level = 'fold'")
    return [point.step for point in client.get_metric_history(fold.info.run_id, "train/loss")]


def _sync(cfg: Config) -> None:
    from prostate_seg.tracking.sync import sync

    workspace, journals = workspace_of(cfg), Path(cfg.paths.journal)
    sync(cfg.mlflow, journals, workspace=workspace, any_address=False, draw=lambda *_: None)


@contextlib.contextmanager
def _stopped_server(folder: Path) -> Iterator[tuple[str, Fault]]:
    with faulty_server(folder / "server") as server:

        @contextlib.contextmanager
        def fault() -> Iterator[None]:
            server.kill()
            yield
            _start_aside(server)

        yield server.address, fault


@contextlib.contextmanager
def _dropped_packets(folder: Path) -> Iterator[tuple[str, Fault]]:
    with faulty_server(folder / "server") as server, network(server.port) as wire:

        @contextlib.contextmanager
        def fault() -> Iterator[None]:
            wire.drop_all()
            yield
            wire.forward()

        yield wire.address, fault


@contextlib.contextmanager
def _crashed_database(folder: Path) -> Iterator[tuple[str, Fault]]:
    reason = why_no_postgres()
    if reason:
        raise SystemExit(reason)
    with (
        postgres_server("mlflow") as databases,
        faulty_server(folder / "server", store=databases["mlflow"]) as server,
    ):
        yield server.address, lambda: crashed_postgres(databases["mlflow"])
        stop_restarted_postgres()


@contextlib.contextmanager
def _locked_file(folder: Path) -> Iterator[tuple[str, Fault]]:
    @contextlib.contextmanager
    def fault() -> Iterator[None]:
        with contextlib.closing(sqlite3.connect(folder / "mlflow.db", timeout=60)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield

    yield f"sqlite:///{folder}/mlflow.db", fault


@contextlib.contextmanager
def _full_disk(folder: Path) -> Iterator[tuple[str, Fault]]:
    with small_disk(folder / "disk") as (disk, why_not):
        if why_not:
            raise SystemExit(f"no small disk can be mounted here: {why_not}")

        @contextlib.contextmanager
        def fault() -> Iterator[None]:
            fill(disk / "filler")
            yield
            (disk / "filler").unlink()

        yield f"sqlite:///{disk}/mlflow.db", fault


def _start_aside(server: Server) -> None:
    """Restart a server in a thread, because waiting for it would count as training time."""
    threading.Thread(target=server.start, daemon=True).start()


FAULTS: dict[str, Callable[[Path], AbstractContextManager[tuple[str, Fault]]]] = {
    "nothing": lambda folder: contextlib.nullcontext(
        (f"sqlite:///{folder}/mlflow.db", lambda: contextlib.nullcontext())
    ),
    "server killed, started again": _stopped_server,
    "network drops everything": _dropped_packets,
    "Postgres crashed, started again": _crashed_database,
    "sqlite file locked": _locked_file,
    "disk of the store full": _full_disk,
}


if __name__ == "__main__":
    main()
