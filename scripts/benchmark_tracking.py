"""The rows of `make bench` on the overhead of tracking: a short stage, an epoch of training, hashing.

This file is not a command; scripts/benchmark.py runs its rows.
"""

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, workspace_of
from prostate_seg.operations.job import Job, Outcome

ROOT = Path(__file__).parents[1]

BARE_SCRIPT = """
import sys, tempfile, time
from pathlib import Path
import hydra, omegaconf, pandas, scipy.ndimage, scipy.stats, SimpleITK, filelock, psutil, yaml, rich.progress, numpy
import prostate_seg.stages.prepare, sklearn.model_selection, dvc_data.hashfile.state, dvc_data.hashfile.tree
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
client = MlflowClient("sqlite:///" + sys.argv[1])
experiment = client.get_experiment_by_name("prostate_seg").experiment_id
client.search_runs([experiment], "attributes.status = 'RUNNING'")
parent = client.search_runs([experiment], "tags.level = 'pipeline'", max_results=1)[0].info.run_id
run = client.create_run(experiment, tags={"mlflow.parentRunId": parent, **{f"t{i}": "x" for i in range(12)}})
run_id = run.info.run_id
client.update_run(parent, status="RUNNING")
client.log_batch(run_id, params=[Param(f"p{i}", "0.123") for i in range(60)], tags=[RunTag(f"a{i}", "x") for i in range(30)])
def files(number):
    with tempfile.TemporaryDirectory() as folder:
        for i in range(number):
            (Path(folder) / f"f{i}.txt").write_text("x" * 3000)
        client.log_artifacts(run_id, folder)
files(5)
client.log_batch(run_id, metrics=[Metric("m", 1.0, 0, 0)], tags=[RunTag(f"md5{i}", "0" * 32) for i in range(25)])
client.log_inputs(run_id, [DatasetInput(Dataset("d", "0" * 32, "local", "{}"), [])])
files(1)
files(2)
client.set_terminated(run_id)
client.log_batch(parent, metrics=[Metric("m", 1.0, 0, 0)])
client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'", max_results=1)
client.set_terminated(parent)
"""
"""A simple script: the imports of stage=prepare and the same number of calls of the same size."""


def tracked_prepare_seconds(in_turn: Callable[..., tuple[float, float]]) -> tuple[float, float]:
    """Return the median seconds of stage=prepare with MLflow on an existing file, and of the bare script."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = ["data.phantom.num_patients=6", "data.phantom.num_second_studies=0", "fold.num_folds=2"]
        first = "stage=fetch,preprocess,prepare"
        ours = [sys.executable, "-m", "prostate_seg", "stage=prepare", *small, "mlflow.on_rerun=keep"]
        bare = [sys.executable, "-c", BARE_SCRIPT, str(folder / "mlflow.db")]

        def run(command: list[str]) -> None:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, env=_environment())

        run([sys.executable, "-m", "prostate_seg", "-m", first, *small])
        return in_turn(lambda: run(ours), lambda: run(bare), repeats=7)


def hashing_seconds(in_turn: Callable[..., tuple[float, float]]) -> tuple[float, float, float]:
    """Return the median seconds to hash 64 files of 8 MiB with an empty state, with `md5sum` on all cores, and again."""
    from prostate_seg.provenance.hashing import hash_paths

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        for index in range(64):
            (folder / "files" / f"{index:03d}").write_bytes(os.urandom(2**23))

        def cold() -> None:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            hash_paths([folder / "files"], cache=folder / "cache")

        def md5sum() -> None:
            command = f"find {folder}/files -type f -print0 | xargs -0 -P {os.cpu_count()} -n 4 md5sum"
            subprocess.run(command, shell=True, check=True, capture_output=True)

        first, theirs = in_turn(cold, md5sum, repeats=5)
        again, _ = in_turn(lambda: hash_paths([folder / "files"], cache=folder / "cache"), lambda: None, repeats=5)
    return first, theirs, again


def recording_seconds(cfg: Config, train: Callable[..., None], *, num_rounds: int) -> dict[str, float]:
    """Return the overhead of recording an epoch, in seconds, for a sqlite file and for a server on this machine.

    One training takes turns, epoch by epoch: not recorded, sqlite, not recorded, server. Each recorded epoch is compared with
    the mean of its two neighbours, and the median of the differences counts. The epochs are short so that there are many; what
    recording costs does not depend on their length.
    """
    with (
        tempfile.TemporaryDirectory() as name,
        _server(Path(name) / "server") as address,
        contextlib.ExitStack() as runs,
    ):
        os.chdir(name)
        sqlite = runs.enter_context(_fold(cfg, f"sqlite:///{name}/mlflow.db"))
        http = runs.enter_context(_fold(cfg, address))
        turns: list[Callable[[int], None]] = [lambda _: None, sqlite, lambda _: None, http]
        seconds: list[float] = []
        mark = time.perf_counter()

        def after_epoch(_: object) -> None:
            nonlocal mark
            seconds.append(time.perf_counter() - mark)
            mark = time.perf_counter()
            turns[len(seconds) % 4](len(seconds))  # its cost, and that of its thread, is part of the next epoch

        train(after_epoch, num_epochs=4 * num_rounds + 5)
        os.chdir(ROOT)
    return {"sqlite": _added(seconds, turn=1), "http": _added(seconds, turn=3), "off": statistics.median(seconds[4::2])}


def _added(seconds: Sequence[float], *, turn: int) -> float:
    places = range(turn + 4, len(seconds) - 1, 4)
    return statistics.median(seconds[i] - (seconds[i - 1] + seconds[i + 1]) / 2 for i in places)


@contextlib.contextmanager
def _fold(cfg: Config, uri: str) -> Iterator[Callable[[int], None]]:
    """Open a run of training with one fold, and yield a function that logs an epoch to it."""
    from prostate_seg.tracking.tracked_run import TrackedRun

    cfg = replace(cfg, stage="train", mlflow=replace(cfg.mlflow, tracking_uri=uri))
    job = Job(overrides=(), output_dir=Path(), hydra_dir=".hydra", sweep_folder=None, number=None)
    run = TrackedRun(cfg, workspace_of(cfg), job)
    with run.open_fold(0) as fold:
        metrics = {"train/loss": 0.1, "val/dice": 0.9, "learning_rate": 1e-3, "seconds": 1.0}
        yield lambda epoch: fold.on_epoch_end(epoch, metrics)
    run.finish(StageResult())
    run.close(Outcome.killed)


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[str]:
    folder.mkdir()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            time.sleep(0.1)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
