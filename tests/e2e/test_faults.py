"""A training whose store fails goes on as if nothing had happened, and the store has everything in the end, once."""

import contextlib
import re
import signal
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from check_stack import acting_as
from mlflow import MlflowClient
from mlflow.entities import Run

from prostate_seg.tracking.journal import journal_folders
from tests.fault_helpers import (
    IMPATIENT,
    Watch,
    crashed_postgres,
    faulty_server,
    fill,
    network,
    small_disk,
    stop_what_was_started_again,
)
from tests.project_helpers import FAULTY, Project, copy_of, until
from tests.server_helpers import postgres_server, why_no_postgres
from tests.stack_helpers import bucket_of, empty_stack, new_user, running_server, why_no_stack

pytestmark = pytest.mark.slow

TRAINING = ("stage=train", "fold.index=0", "train.max_epochs=20000", "train.steps_per_epoch=3")
"""Many short epochs, for as long as a test needs."""


@pytest.fixture
def project(prepared: Project, tmp_path: Path) -> Project:
    return copy_of(prepared, tmp_path / "project")


@pytest.fixture
def database() -> Iterator[str | None]:
    """Postgres where it is installed; without it, the server keeps its runs in sqlite."""
    if why_no_postgres():
        yield None
        return
    with postgres_server("mlflow") as databases:
        yield databases["mlflow"]
        stop_what_was_started_again()


@contextlib.contextmanager
def training(project: Project, address: str, *settings: str, **environment: str) -> Iterator[Watch]:
    arguments = [*TRAINING, f"mlflow.tracking_uri={address}", *settings]
    process = project.start("none", "impatient", *arguments, program=str(FAULTY), **IMPATIENT, **environment)
    watch = Watch(project, process)
    try:
        until(lambda: watch.num_told > 8 or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()[0]
        yield watch
    finally:
        process.kill()


def ended(watch: Watch, *, code: int = 0) -> str:
    output, _ = watch.process.communicate(timeout=120)
    assert watch.process.returncode == code, output
    assert "Traceback" not in output
    return output


def is_whole(address: str, *, output: str, status: str = "FINISHED") -> Run:
    """Require that the store has every epoch that the training has shown, in order and once, and its end; return the fold."""
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


def test_training_continues_while_server_network_and_database_fail(
    project: Project, database: str | None, tmp_path: Path
) -> None:
    with (
        faulty_server(tmp_path / "server", store=database) as server,
        network(server.port) as wire,
        training(project, wire.address) as watch,
    ):
        server.kill()
        watch.is_told_no_more()
        server.start()
        watch.catches_up()
        wire.drop_everything()
        watch.is_told_no_more()
        wire.carry()
        watch.catches_up()
        if database is not None:
            with crashed_postgres(database):
                watch.is_told_no_more()
            watch.catches_up()
        watch.process.send_signal(signal.SIGTERM)
        is_whole(server.address, output=ended(watch, code=143), status="KILLED")
        assert journal_folders(project.folder / ".spool") == []


def test_unacknowledged_records_stay_on_disk_until_sync_replicates_them(project: Project, tmp_path: Path) -> None:
    with faulty_server(tmp_path / "server") as server:
        with training(project, server.address, "train.max_minutes=0.15") as watch:
            (server.folder / "artifacts").rename(server.folder / "artifacts.away")
            (server.folder / "artifacts").write_text("no folder: every upload is refused")
            output = ended(watch)
        assert "records of this run wait in .spool/" in output
        (server.folder / "artifacts").unlink()
        (server.folder / "artifacts.away").rename(server.folder / "artifacts")

        store = f"mlflow.tracking_uri={server.address}"
        killed = project.run("ok,ok,kill", "delivery", "stage=sync", store, program=str(FAULTY))
        assert killed.returncode == -9
        sent = project.run("stage=sync", store)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert ": sent, run " in sent.stdout
        fold = is_whole(server.address, output=output)
        client = MlflowClient(tracking_uri=server.address)
        assert [info.path for info in client.list_artifacts(fold.info.run_id, "figures")] == ["figures/history.png"]
        assert journal_folders(project.folder / ".spool") == []


def test_training_continues_while_its_sqlite_file_is_locked_or_the_disk_is_full(
    project: Project, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk") as (disk, why_not_small):
        store = f"sqlite:///{disk}/mlflow.db"
        with training(project, store) as watch:
            with contextlib.closing(sqlite3.connect(disk / "mlflow.db", timeout=60)) as connection:
                connection.execute("BEGIN EXCLUSIVE")
                watch.is_told_no_more()
            watch.catches_up()
            if not why_not_small:
                fill(disk / "filler")
                watch.is_told_no_more()
            watch.process.send_signal(signal.SIGTERM)
            output = ended(watch, code=143)
        if not why_not_small:
            assert "records of this run wait in .spool/" in output
            (disk / "filler").unlink()
            sent = project.run("stage=sync", f"mlflow.tracking_uri={store}")
            assert sent.returncode == 0, sent.stdout + sent.stderr
        is_whole(store, output=output, status="KILLED")
        if why_not_small:
            pytest.skip(f"no small disk can be mounted here to be filled: {why_not_small}")


@pytest.mark.skipif(why_no_stack() is not None, reason=f"no stack: {why_no_stack()}")
def test_records_of_a_stopped_stack_are_replicated_later_also_after_bucket_errors(
    project: Project, tmp_path: Path
) -> None:
    """The whole stack, as a plain user: nothing is lost, though the server never comes back while the training lives."""
    with empty_stack(tmp_path / "stack") as stack:
        with contextlib.ExitStack() as alive:
            with running_server(stack):
                ann = new_user(stack, "ann")
                login = {"MLFLOW_TRACKING_USERNAME": ann.name, "MLFLOW_TRACKING_PASSWORD": ann.password}
                watch = alive.enter_context(training(project, stack.address, "train.max_minutes=0.4", **login))
            watch.is_told_no_more()
            output = ended(watch)
        assert "records of this run wait in .spool/" in output

        sync = ["stage=sync", f"mlflow.tracking_uri={stack.address}"]
        gone = project.run(*sync, **login)
        assert gone.returncode == 1
        assert f"the tracking store {stack.address} cannot be used" in gone.stderr
        with running_server(replace(stack, settings=stack.settings | {"S3_BUCKET": "gone"})):
            bucket_of(stack).delete_bucket(Bucket="gone")
            refused = project.run(*sync, **login)
            assert refused.returncode == 1, refused.stdout + refused.stderr
            assert "Traceback" not in refused.stderr
            assert journal_folders(project.folder / ".spool")
        with running_server(stack), acting_as(ann):
            sent = project.run(*sync, **login)
            assert sent.returncode == 0, sent.stdout + sent.stderr
            fold = is_whole(stack.address, output=output)
            client = MlflowClient(tracking_uri=stack.address)
            assert [info.path for info in client.list_artifacts(fold.info.run_id, "figures")] == ["figures/history.png"]
        assert journal_folders(project.folder / ".spool") == []
