"""Check that an MLflow server with basic auth stores runs and models, and refuses them to other users: `make stack-check`.

The server is that of MLFLOW_TRACKING_URI, with its administrator (MLFLOW_TRACKING_USERNAME, _PASSWORD); by default the stack
of docker/.env. The check creates three users, an experiment and a model, and removes them afterwards. Exit code 0 if every
line is ok.
"""

import argparse
import hashlib
import json
import logging
import os
import secrets
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from stack_settings import login_to_use

FILE = "weights.bin"
QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}


@dataclass(frozen=True, kw_only=True)
class User:
    """A user account."""

    name: str
    password: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The objects that the writer created on the server."""

    experiment_id: str
    run_id: str
    model: str
    artifact_uri: str
    sha256: str


class Checks:
    """Prints a line per check and counts failed checks."""

    def __init__(self) -> None:
        self.num_bad = 0

    def report(self, good: bool, text: str) -> None:
        """Print and count a check."""
        self.num_bad += not good
        print(f"{'ok  ' if good else 'BAD '} {text}", flush=True)

    def refused(self, text: str, act: Callable[[], object]) -> None:
        """Check that the server refuses with status 403; any other error is a failed check."""
        try:
            act()
        except (MlflowException, OSError) as error:
            self.report("403" in str(error) or "Permission denied" in str(error), f"{text}: refused")
        else:
            self.report(False, f"{text}: NOT refused")


def main() -> None:
    """Check the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=50, help="size of the artifact (default 50)")
    arguments = parser.parse_args()
    login = login_to_use(os.environ)
    address = login["MLFLOW_TRACKING_URI"]
    admin = User(name=login["MLFLOW_TRACKING_USERNAME"], password=login["MLFLOW_TRACKING_PASSWORD"])
    os.environ |= QUIET | dict(os.environ)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    checks = Checks()
    try:
        check_strangers_without_login(checks, address)
        if checks.num_bad:
            sys.exit(f"{address} has no access control: start it as docker/compose.yaml does")
        with acting_as(admin), users_of_the_check(address) as (writer, reader, stranger):
            check_users(checks, address, writer, reader, stranger, num_bytes=arguments.megabytes * 2**20)
    except (MlflowException, OSError) as error:
        sys.exit(f"BAD  {address} failed: {first_line(error)}\nSee the server's log: docker compose logs")
    if checks.num_bad:
        sys.exit(f"{checks.num_bad} checks failed: do not store data on {address} before they pass")
    print(f"{address} passed: runs and models are stored, and refused to other users")


def check_strangers_without_login(checks: Checks, address: str) -> None:
    """Check that requests without a login, or with another host name, are refused."""
    query = f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0"
    checks.report(status_of(f"{address}/health") == 200, f"{address} answers")
    checks.report(status_of(query) == 401, "a client without login: refused")
    checks.report(status_of(query, Host="rebound.example") == 403, "a request with another host name: refused")


@contextmanager
def users_of_the_check(address: str) -> Iterator[list[User]]:
    """Create three users, and remove them afterwards."""
    admin = get_app_client("basic-auth", tracking_uri=address)
    mark = secrets.token_hex(4)
    users = [
        User(name=f"check-{role}-{mark}", password=secrets.token_urlsafe(16)) for role in ("writer", "reader", "third")
    ]
    try:
        for user in users:
            admin.create_user(user.name, user.password)
        yield users
    finally:
        for user in users:
            with suppress(MlflowException):
                admin.delete_user(user.name)


def check_users(checks: Checks, address: str, writer: User, reader: User, stranger: User, *, num_bytes: int) -> None:
    """Check writing, reading and refusals with one user each; clean up as the administrator."""
    client = MlflowClient(tracking_uri=address)
    with acting_as(writer):
        recorded = write(checks, client, writer.name, num_bytes=num_bytes)
    try:
        with acting_as(writer):
            rights = get_app_client("basic-auth", tracking_uri=address)
            rights.grant_user_permission(reader.name, "experiment", recorded.experiment_id, "READ")
            rights.grant_user_permission(reader.name, "registered_model", recorded.model, "READ")
        with acting_as(reader):
            check_reader(checks, client, recorded)
        with acting_as(stranger):
            check_stranger(checks, client, recorded)
    finally:
        get_artifact_repository(recorded.artifact_uri, tracking_uri=address).delete_artifacts()
        client.delete_registered_model(recorded.model)
        client.delete_experiment(recorded.experiment_id)


def write(checks: Checks, client: MlflowClient, name: str, *, num_bytes: int) -> Recorded:
    """Log a run with an artifact, and register a model from it."""
    experiment_id = client.create_experiment(name)
    run = client.create_run(experiment_id)
    client.log_param(run.info.run_id, "learning_rate", "0.003")
    client.log_metric(run.info.run_id, "val/dice", 0.9, step=1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        file.write_bytes(secrets.token_bytes(num_bytes))
        sha256 = hash_of(file)
        start = time.monotonic()
        client.log_artifact(run.info.run_id, str(file))
        seconds = time.monotonic() - start
    client.set_terminated(run.info.run_id)
    client.create_registered_model(name)
    artifact_uri = client.get_run(run.info.run_id).info.artifact_uri
    client.create_model_version(name, source=artifact_uri, run_id=run.info.run_id)
    checks.report(
        artifact_uri.startswith("mlflow-artifacts:"),
        "artifacts are proxied by the server: clients have no keys of the S3 store",
    )
    checks.report(not announces_the_store(client.tracking_uri), "and need no connection to it")
    checks.report(True, f"one user logs a run, {num_bytes / 2**20:.0f} MB in {seconds:.1f} s, and registers a model")
    return Recorded(
        experiment_id=experiment_id, run_id=run.info.run_id, model=name, artifact_uri=artifact_uri, sha256=sha256
    )


def check_reader(checks: Checks, client: MlflowClient, recorded: Recorded) -> None:
    """Check that a user with permission READ reads the same data, and cannot write."""
    run = client.get_run(recorded.run_id)
    same = run.data.params == {"learning_rate": "0.003"} and run.data.metrics == {"val/dice": 0.9}
    checks.report(same and run.info.status == "FINISHED", "another user with permission READ reads the run")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(client.download_artifacts(recorded.run_id, FILE, folder))
        checks.report(hash_of(file) == recorded.sha256, "and the same artifact, byte for byte")
    version = client.get_model_version(recorded.model, "1")
    checks.report(version.run_id == recorded.run_id, "and the model")
    checks.refused("writing to the run", lambda: client.log_metric(recorded.run_id, "val/dice", 1.0))
    checks.refused("deleting the run", lambda: client.delete_run(recorded.run_id))
    checks.refused("putting an artifact", lambda: put_text(recorded, client))


def check_stranger(checks: Checks, client: MlflowClient, recorded: Recorded) -> None:
    """Check that a user without permission can read nothing."""
    checks.refused("a third user who reads the run", lambda: client.get_run(recorded.run_id))
    checks.refused("its artifact", lambda: download(recorded, client))
    checks.refused("the model", lambda: client.get_registered_model(recorded.model))
    checks.refused("writing to it", lambda: client.log_param(recorded.run_id, "x", "1"))
    found = [experiment.experiment_id for experiment in client.search_experiments()]
    checks.report(recorded.experiment_id not in found, "and no search of the third user finds it")
    checks.report(not client.search_registered_models(f"name='{recorded.model}'"), "nor the model")


def download(recorded: Recorded, client: MlflowClient) -> None:
    """Read the artifact without reading the run first."""
    with tempfile.TemporaryDirectory() as folder:
        get_artifact_repository(recorded.artifact_uri, tracking_uri=client.tracking_uri).download_artifacts(
            FILE, folder
        )


def put_text(recorded: Recorded, client: MlflowClient) -> None:
    """Write an artifact without reading the run first."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine.txt"
        file.write_text("mine")
        get_artifact_repository(recorded.artifact_uri, tracking_uri=client.tracking_uri).log_artifact(str(file))


@contextmanager
def acting_as(user: User) -> Iterator[None]:
    """Set the login of MLflow's client to this user."""
    login = {"MLFLOW_TRACKING_USERNAME": user.name, "MLFLOW_TRACKING_PASSWORD": user.password}
    before = {name: os.environ[name] for name in login if name in os.environ}
    os.environ.update(login)
    try:
        yield
    finally:
        for name in login:
            del os.environ[name]
        os.environ.update(before)


def status_of(url: str, **headers: str) -> int:
    """Return the status code of a plain request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def announces_the_store(address: str) -> bool:
    """Return whether the server announces downloads from the S3 store, which MLflow's clients then use."""
    try:
        with urllib.request.urlopen(f"{address}/api/3.0/mlflow/server-info", timeout=30) as reply:
            return bool(json.load(reply).get("multipart_downloads_enabled"))
    except urllib.error.HTTPError:
        return False


def hash_of(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    main()
