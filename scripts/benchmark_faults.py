"""Measure what a failing store costs a training: `python scripts/benchmark_faults.py [--seconds 30] [--rounds 2]`.

One training, in this process, whose store is well and fails in turns of equal length, as often as there are rounds. Of each
turn with a fault the time of a step is compared with that of the turns around it, and the processor time too, which other
programs on the machine disturb less. In the end what the store has is compared with what the training reported, before and
after stage=sync.
"""

import argparse
import contextlib
import json
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmark_training import benchmark_config, pack_noise, train  # noqa: E402

from prostate_seg.config import Config  # noqa: E402
from prostate_seg.segmentation.packing import PackedSet  # noqa: E402
from prostate_seg.tracking.job import Job, Outcome  # noqa: E402
from prostate_seg.workspace import StageResult, workspace_of  # noqa: E402
from tests.fault_helpers import (  # noqa: E402
    Server,
    crashed_postgres,
    faulty_server,
    fill,
    network,
    small_disk,
    stop_what_was_started_again,
)
from tests.server_helpers import postgres_server, why_no_postgres  # noqa: E402

NUM_STEPS = 1
"""Of an epoch: one, so that a turn has many."""

Fault = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Turn:
    """A stretch of training."""

    is_fault: bool
    seconds: list[float]
    """Of each epoch."""
    cpu_seconds: float
    """Of all threads, per epoch."""


def main() -> None:
    """Print a row per fault, and all of them as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    cfg = benchmark_config()
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
    around = [(turns[i - 1], turns[i], turns[i + 1]) for i, turn in enumerate(turns[:-1]) if turn.is_fault]
    wall = [statistics.median(t.seconds) / statistics.median(a.seconds + b.seconds) for a, t, b in around]
    cpu = [t.cpu_seconds / statistics.mean((a.cpu_seconds, b.cpu_seconds)) for a, t, b in around]
    return {
        "seconds": seconds,
        "times": len(around),
        "step_ratio": round(statistics.median(wall), 4),
        "step_ratios": [round(one, 3) for one in wall],
        "cpu_ratio": round(statistics.median(cpu), 4),
        "epochs": reported,
        "on_disk_at_the_end": kept,
        "in_store_at_the_end": len(there),
        "in_store_after_sync": len(after),
        "lost": reported - len(set(after)),
        "twice": len(after) - len(set(after)),
        "in_order": after == sorted(after),
    }


def _trained(cfg: Config, packed: PackedSet, fault: Fault, seconds: float, rounds: int) -> tuple[list[Turn], int, int]:
    """Train for an odd number of turns; return them, the number of epochs and the records that wait in the end."""
    from prostate_seg.tracking.spool import waiting
    from prostate_seg.tracking.stage_run import open_stage_run

    job = Job(overrides=(), output_dir=Path(), hydra_dir=".hydra", sweep_folder=None, number=None)
    run = open_stage_run(cfg, workspace_of(cfg), job)
    turns: list[Turn] = []
    times: list[float] = []
    number = 0
    failing = ExitStack()
    with contextlib.suppress(StopIteration), run.open_fold(0) as fold:
        mark, began, cpu = time.perf_counter(), time.perf_counter(), time.process_time()

        def after_epoch(_: object) -> None:
            nonlocal mark, began, cpu, times, number
            number += 1
            fold.on_epoch_end(number, {"train/loss": 1 / number, "learning_rate": 1e-3, "seconds": 1.0})
            times.append(time.perf_counter() - mark)
            if time.perf_counter() - began >= seconds:
                used = (time.process_time() - cpu) / len(times)
                turns.append(Turn(is_fault=len(turns) % 2 == 1, seconds=times, cpu_seconds=used))
                failing.close()
                if len(turns) == 2 * rounds + 1:
                    raise StopIteration
                if len(turns) % 2 == 1:
                    failing.enter_context(fault())
                times, began, cpu = [], time.perf_counter(), time.process_time()
            mark = time.perf_counter()

        train(cfg, packed, num_steps=NUM_STEPS, num_epochs=100_000, on_epoch_end=after_epoch)
    run.finish(StageResult())
    run.close(Outcome.killed)
    kept = sum(found.num_records for found in waiting(Path(cfg.paths.spool)))
    return turns, number, kept


def _points(address: str) -> list[int]:
    """Return the epochs that the store has, in its order."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("prostate_seg")
    assert experiment is not None
    (fold,) = client.search_runs([experiment.experiment_id], "tags.level = 'fold'")
    return [point.step for point in client.get_metric_history(fold.info.run_id, "train/loss")]


def _sync(cfg: Config) -> None:
    from prostate_seg.tracking.sync import sync

    workspace, spool = workspace_of(cfg), Path(cfg.paths.spool)
    sync(cfg.mlflow, spool, workspace=workspace, any_address=False, draw=lambda *_: None)


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
            wire.drop_everything()
            yield
            wire.carry()

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
        stop_what_was_started_again()


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
    """Start a server again without waiting for it: that is the training's time."""
    import threading

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
