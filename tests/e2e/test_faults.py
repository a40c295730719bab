"""A training with a failing store continues, and at the end the store has every record once."""

import contextlib
import signal
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from check_stack import acting_as
from mlflow import MlflowClient

from prostate_seg.tracking.journal import journal_folders
from tests.fault_helpers import (
    crashed_postgres,
    ended,
    faulty_server,
    fill,
    is_whole,
    network,
    small_disk,
    stop_restarted_postgres,
    training,
)
from tests.project_helpers import FAULTY, Project, copy_of, only_in_hard_use
from tests.server_helpers import postgres_server, why_no_postgres
from tests.stack_helpers import bucket_of, empty_stack, new_user, running_server, why_no_stack

pytestmark = pytest.mark.slow


@pytest.fixture
def project(prepared: Project, tmp_path: Path) -> Project:
    return copy_of(prepared, tmp_path / "project")


@pytest.fixture
def database() -> Iterator[str | None]:
    """Address of Postgres if it is installed; otherwise the server uses sqlite."""
    if why_no_postgres():
        yield None
        return
    with postgres_server("mlflow") as databases:
        yield databases["mlflow"]
        stop_restarted_postgres()


def test_training_continues_while_server_network_and_database_fail(
    project: Project, database: str | None, tmp_path: Path
) -> None:
    with (
        faulty_server(tmp_path / "server", store=database) as server,
        network(server.port) as wire,
        training(project, wire.address) as watch,
    ):
        server.kill()
        watch.wait_until_store_stops()
        server.start()
        watch.wait_until_replicated()
        wire.drop_all()
        watch.wait_until_store_stops()
        wire.forward()
        watch.wait_until_replicated()
        if database is not None:
            with crashed_postgres(database):
                watch.wait_until_store_stops()
            watch.wait_until_replicated()
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
        killed = project.run("ok,ok,kill", "replication", "stage=sync", store, program=str(FAULTY))
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
                watch.wait_until_store_stops()
            watch.wait_until_replicated()
            if not why_not_small:
                fill(disk / "filler")
                watch.wait_until_store_stops()
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
@only_in_hard_use
def test_records_of_a_stopped_stack_are_replicated_later_also_after_bucket_errors(
    project: Project, tmp_path: Path
) -> None:
    """The server stack, as a plain user: no record is lost if the server stops permanently during the training."""
    with empty_stack(tmp_path / "stack") as stack:
        with contextlib.ExitStack() as alive:
            with running_server(stack):
                ann = new_user(stack, "ann")
                login = {"MLFLOW_TRACKING_USERNAME": ann.name, "MLFLOW_TRACKING_PASSWORD": ann.password}
                watch = alive.enter_context(training(project, stack.address, "train.max_minutes=0.4", **login))
            watch.wait_until_store_stops()
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
