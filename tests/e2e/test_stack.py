"""The server stack as processes: storage, access control, and backups."""

import contextlib
import http.server
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import check_stack
import mlflow
import pytest
import requests
import stack_users
from check_stack import User, acting_as
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tests.conftest import ROOT
from tests.project_helpers import Project, clean_environment
from tests.stack_helpers import (
    DOCKER,
    Stack,
    administrator,
    bucket_of,
    compose,
    empty_stack,
    new_user,
    read_settings,
    running_server,
    running_stack,
    server_environment,
    why_no_stack,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_no_stack() is not None, reason=f"no stack: {why_no_stack()}"),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack") / "stack") as running:
        yield running


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / name), *arguments]
    env = clean_environment() | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


def test_one_user_writes_another_reads_and_a_third_is_refused(stack: Stack) -> None:
    client = MlflowClient(tracking_uri=stack.address)

    def names() -> list[str]:
        with acting_as(administrator(stack)):
            return [one.name for one in (*client.search_experiments(), *client.search_registered_models())]

    before = names()
    done = script("scripts/check_stack.py", **stack.login)
    assert done.returncode == 0, done.stdout + done.stderr
    *checks, last = done.stdout.splitlines()
    assert len(checks) == 18
    assert all(line.startswith("ok ") for line in checks)
    assert "50 MB" in done.stdout
    assert last == f"{stack.address} passed: runs and models are stored, and refused to other users"
    assert names() == before  # the check removes its objects
    with acting_as(administrator(stack)):
        users = requests.get(
            f"{stack.address}/api/2.0/mlflow/users/list", auth=tuple(stack.login.values())[1:], timeout=30
        ).json()
    assert not [user["username"] for user in users["users"] if user["username"].startswith("check-")]


class OpenServer(http.server.BaseHTTPRequestHandler):
    """A server without access control."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def test_check_detects_a_server_without_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_stack.py"])
    monkeypatch.setattr(os, "environ", {**os.environ, "MLFLOW_TRACKING_USERNAME": "admin"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OpenServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(SystemExit, match="set MLFLOW_TRACKING_PASSWORD: the server, and an administrator of it"):
            check_stack.main()
        os.environ["MLFLOW_TRACKING_PASSWORD"] = "planted-password"
        with pytest.raises(SystemExit, match="has no access control") as caught:
            check_stack.main()
        server.shutdown()
    written = capsys.readouterr().out
    assert "BAD  a client without login: refused" in written
    assert "planted-password" not in written + str(caught.value)


def test_administrator_manages_users_and_permissions(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The variables of the server are used, whatever store this process uses otherwise.
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")

    def users(*arguments: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["stack_users.py", *arguments])
            for name, value in stack.login.items():
                patch.setenv(name, value)
            stack_users.main()
        return capsys.readouterr().out

    added = users("add", "bob")
    bob = User(name="bob", password=added.split("MLFLOW_TRACKING_PASSWORD=")[1].strip())
    client = MlflowClient(tracking_uri=stack.address)
    with acting_as(administrator(stack)):
        experiment = client.create_experiment("shared")
    assert users("grant", "bob", "EDIT", "--experiment", "shared") == "bob: EDIT on experiment shared\n"
    with acting_as(bob):
        run = client.create_run(experiment).info.run_id
    assert users("grant", "bob", "NONE", "--experiment", "shared") == "bob: NONE on experiment shared\n"
    with acting_as(bob), pytest.raises(MlflowException, match="403"):
        client.get_run(run)
    with acting_as(User(name="bob", password=users("password", "bob").split("PASSWORD=")[1].strip())):
        assert client.search_experiments() == []
    assert users("remove", "bob") == "bob is removed\n"
    with pytest.raises(SystemExit, match="there is no experiment nowhere"):
        users("grant", "bob", "READ", "--experiment", "nowhere")
    with pytest.raises(SystemExit, match="bob"):
        users("remove", "bob")


MINE = "what belongs to the victim"
ATTACKS = {
    "artifacts of another user by path": ("GET", "/api/2.0/mlflow-artifacts/artifacts/{experiment}/{run}/artifacts/mine.txt"),
    "the same with dots": ("GET", "/api/2.0/mlflow-artifacts/artifacts/x/../{experiment}/{run}/artifacts/mine.txt"),
    "the same with encoded dots": ("GET", "/api/2.0/mlflow-artifacts/artifacts/%2e%2e/{experiment}/{run}/artifacts/mine.txt"),
    "artifacts of another user by run": ("GET", "/get-artifact?run_uuid={run}&path=mine.txt"),
    "writing into another's artifacts": ("PUT", "/api/2.0/mlflow-artifacts/artifacts/{experiment}/{run}/artifacts/x"),
    "deleting another's artifacts": ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/{experiment}/{run}/artifacts"),
    "a run in another's experiment": ("POST", "/api/2.0/mlflow/runs/create", {"experiment_id": "{experiment}"}),
    "deleting another's experiment": ("POST", "/api/2.0/mlflow/experiments/delete", {"experiment_id": "{experiment}"}),
    "granting oneself a right": (
        "POST", "/api/3.0/mlflow/users/permissions/grant",
        {"username": "{attacker}", "resource_type": "experiment", "resource_id": "{experiment}", "permission": "MANAGE"},
    ),
    "becoming an administrator": ("PATCH", "/api/2.0/mlflow/users/update-admin", {"username": "{attacker}", "is_admin": True}),
    "making a user": ("POST", "/api/2.0/mlflow/users/create", {"username": "x", "password": "long-enough-password"}),
    "another's password": (
        "PATCH", "/api/2.0/mlflow/users/update-password", {"username": "{victim}", "password": "long-enough-password"},
    ),
    "removing a user": ("DELETE", "/api/2.0/mlflow/users/delete", {"username": "{victim}"}),
}  # fmt: skip
"""Attacks of one user on another: method, path, and JSON; each must be refused."""


def test_attacks_of_one_user_on_another_are_refused(stack: Stack, tmp_path: Path) -> None:
    victim, attacker = new_user(stack, "victim"), new_user(stack, "attacker")
    client = MlflowClient(tracking_uri=stack.address)
    with acting_as(victim):
        experiment = client.create_experiment(victim.name)
        run = client.create_run(experiment).info.run_id
        (tmp_path / "mine.txt").write_text(MINE)
        client.log_artifact(run, str(tmp_path / "mine.txt"))
        model = client.create_logged_model(experiment, source_run_id=run)
    with acting_as(attacker):
        client.create_registered_model(attacker.name)
        with pytest.raises(MlflowException, match="403"):
            client.create_model_version(attacker.name, source=f"models:/{model.model_id}", model_id=model.model_id)
    names = {"experiment": experiment, "run": run, "attacker": attacker.name, "victim": victim.name}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return value.format(**names) if isinstance(value, str) else value

    answers = {}
    for name, (method, path, *body) in ATTACKS.items():
        request = requests.Request(method, "http://x", json=filled(body[0]) if body else None).prepare()
        request.url = stack.address + filled(path)  # unchanged: requests would normalise the dots
        request.prepare_auth((attacker.name, attacker.password))
        with requests.Session() as session:
            reply = session.send(request, timeout=30)
        answers[name] = reply.status_code
        assert MINE not in reply.text, name
    assert {name: status for name, status in answers.items() if status != 403} == {}
    found = requests.post(
        f"{stack.address}/api/2.0/mlflow/runs/search",
        json={"experiment_ids": [experiment]},
        auth=(attacker.name, attacker.password),
        timeout=30,
    )
    assert found.json() == {}
    with acting_as(victim):
        assert client.get_run(run).info.lifecycle_stage == "active"
        assert Path(client.download_artifacts(run, "mine.txt", str(tmp_path))).read_text() == MINE


@pytest.mark.parametrize(
    "location",
    [
        "mlflow-artifacts:/{experiment}/{run}/artifacts",
        "s3://mlflow/{experiment}/{run}/artifacts",
        "file:///etc",
        "/proc/self",
    ],
)
def test_paths_of_a_user_give_no_access_to_other_files(stack: Stack, tmp_path: Path, location: str) -> None:
    victim, attacker = new_user(stack, "victim"), new_user(stack, "attacker")
    client = MlflowClient(tracking_uri=stack.address)
    with acting_as(victim):
        experiment = client.create_experiment(victim.name)
        run = client.create_run(experiment).info.run_id
        (tmp_path / "mine.txt").write_text(MINE)
        client.log_artifact(run, str(tmp_path / "mine.txt"))
    there = location.format(experiment=experiment, run=run)
    with acting_as(attacker):
        client.create_registered_model(attacker.name)
        with pytest.raises(MlflowException, match="Invalid model version source"):
            client.create_model_version(attacker.name, source=there)
        own = client.create_run(client.create_experiment(attacker.name, artifact_location=there))
        # MLflow appends the random id of the run to every location, so no existing file is below it.
        assert own.info.run_id in own.info.artifact_uri
        for path in ("mine.txt", "../../mine.txt", "/etc/hostname", "../../hostname", "environ", "../../environ"):
            reply = requests.get(
                f"{stack.address}/get-artifact",
                params={"run_uuid": own.info.run_id, "path": path},
                auth=(attacker.name, attacker.password),
                timeout=30,
            )
            assert reply.status_code in (400, 404, 500), path  # 500: no such object, in a message of the S3 store
            assert MINE not in reply.text


def test_launcher_records_as_a_plain_user_and_stores_no_password(stack: Stack, tmp_path: Path) -> None:
    ann, project = new_user(stack, "ann"), Project(tmp_path)
    login = {"MLFLOW_TRACKING_URI": stack.address, "MLFLOW_TRACKING_USERNAME": ann.name}
    done = project.run("stage=fetch", "mlflow=server", MLFLOW_TRACKING_PASSWORD=ann.password, **login)
    assert done.returncode == 0, done.stdout + done.stderr
    with acting_as(ann):
        client = MlflowClient(tracking_uri=stack.address)
        experiment = client.get_experiment_by_name("prostate_seg")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id], "tags.level = 'stage'")
        assert run.info.status == "FINISHED"
        client.download_artifacts(run.info.run_id, "", str(tmp_path))
    assert (tmp_path / "provenance.json").exists()
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert ann.password.encode() not in path.read_bytes(), path
    wrong = project.run("stage=fetch", "mlflow=server", MLFLOW_TRACKING_PASSWORD="planted-wrong-password", **login)
    assert wrong.returncode == 1
    assert f"the tracking store {stack.address} cannot be used" in wrong.stderr
    assert "planted-wrong-password" not in wrong.stdout + wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_no_password_is_in_a_log_or_a_command_line(stack: Stack) -> None:
    wrong = requests.get(f"{stack.address}/", auth=("admin", "planted-wrong-password"), timeout=30)
    assert wrong.status_code == 401
    secret = {name: value for name, value in stack.settings.items() if name.endswith(("PASSWORD", "KEY"))}
    commands = [
        path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if _is_there(path)
    ]
    written = stack.written()
    assert "POST /api/2.0/mlflow/experiments/create" in written
    assert any("start_mlflow.py" in command or "basic-auth" in command for command in commands)
    for name, value in {**secret, "wrong": "planted-wrong-password"}.items():
        assert value not in written, name
        assert not [command for command in commands if value in command], name


def _is_there(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool(path.read_bytes())
    return False


def start(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    env = clean_environment() | {name: str(value) for name, value in environment.items()}
    command = [sys.executable, str(DOCKER / "start_mlflow.py"), *(arguments or ["--port=1"])]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_server_refuses_the_passwords_of_the_example() -> None:
    settings = read_settings(DOCKER / ".env.example")
    done = start(compose(settings)["services"]["server"]["environment"])
    assert done.returncode == 1
    for name in ("ADMIN_PASSWORD", "SECRET_KEY", "POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert name in done.stderr
    assert "make stack" in done.stderr
    assert "Traceback" not in done.stderr
    good = "long-enough-password"
    others = dict.fromkeys(("MLFLOW_SECRET_KEY", "POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"), good)
    done = start(compose(settings | others | {"MLFLOW_ADMIN_PASSWORD": "short"})["services"]["server"]["environment"])
    assert done.returncode == 1
    assert "MLFLOW_AUTH_ADMIN_PASSWORD" in done.stderr
    assert "POSTGRES_PASSWORD" not in done.stderr


def test_server_without_its_store_does_not_start() -> None:
    good = "long-enough-password"
    names = ("MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY", "POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY")
    settings = dict.fromkeys(names, good) | {"S3_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = start(compose(settings)["services"]["server"]["environment"] | {"AWS_MAX_ATTEMPTS": "1"})
    assert done.returncode == 1
    assert "the S3 store http://127.0.0.1:9 cannot be used for the bucket mlflow" in done.stderr
    assert good not in done.stderr
    assert "Traceback" not in done.stderr


def test_trash_is_emptied_and_tables_are_upgraded(stack: Stack, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=stack.address)
    with acting_as(new_user(stack, "ann")):
        experiment = client.create_experiment(f"trash-{secrets.token_hex(3)}")
        deleted, kept = (client.create_run(experiment).info.run_id for _ in range(2))
        (tmp_path / "x.txt").write_text("x")
        for run in (deleted, kept):
            client.log_artifact(run, str(tmp_path / "x.txt"))
        client.delete_run(deleted)
    inside = server_environment(stack) | {"MLFLOW_TRACKING_URI": stack.address}
    done = [start(inside, *arguments) for arguments in (["gc"], ["upgrade"])]
    assert [one.returncode for one in done] == [0, 0], done
    assert {key.split("/")[1] for key, _, _ in objects_of(stack) if key.startswith(f"{experiment}/")} == {kept}
    for one in done:
        assert stack.settings["POSTGRES_PASSWORD"] not in one.stdout + one.stderr


def test_backup_restored_into_an_empty_stack_is_the_same_stack(stack: Stack, tmp_path: Path) -> None:
    ann = new_user(stack, "ann")
    content = secrets.token_bytes(2**20)
    client = MlflowClient(tracking_uri=stack.address)
    with acting_as(ann):
        experiment = client.create_experiment(ann.name)
        run = client.create_run(experiment).info.run_id
        client.log_metric(run, "val/dice", 0.9, step=3)
        (tmp_path / "weights.bin").write_bytes(content)
        client.log_artifact(run, str(tmp_path / "weights.bin"), "fold0")
        client.create_registered_model(ann.name)
        client.create_model_version(ann.name, source=client.get_run(run).info.artifact_uri, run_id=run)
        client.set_registered_model_alias(ann.name, "champion", "1")
    backups = tmp_path / "backups"
    done = script("scripts/stack_backup.py", "save", str(backups / "first"), **stack.data)
    assert done.returncode == 0, done.stderr
    second = script("scripts/stack_backup.py", "save", str(backups / "second"), **stack.data)
    assert "unchanged ones shared with first" in second.stdout, second.stderr
    (file,) = [path for path in (backups / "second").rglob("*") if path.is_file() and path.read_bytes() == content]
    assert file.samefile(backups / "first" / file.relative_to(backups / "second"))
    assert "exists already" in script("scripts/stack_backup.py", "save", str(backups / "first"), **stack.data).stderr
    assert sorted(path.name for path in backups.iterdir()) == ["first", "second"]

    refused = script("scripts/stack_backup.py", "restore", str(backups / "first"), **stack.data)
    assert refused.returncode == 1
    assert "tables already; only an empty stack is restored" in refused.stderr
    with empty_stack(tmp_path / "other") as other:
        damaged = shutil.copytree(backups / "second", backups / "damaged")
        (damaged / file.relative_to(backups / "second")).write_bytes(content[:-1])
        done = script("scripts/stack_backup.py", "restore", str(damaged), **other.data)
        assert done.returncode == 1
        assert "1 of its files are missing or damaged" in done.stderr
        store = bucket_of(other)
        store.create_bucket(Bucket="mlflow")
        store.put_object(Bucket="mlflow", Key="of somebody else", Body=b"x")
        done = script("scripts/stack_backup.py", "restore", str(backups / "first"), **other.data)
        assert "contains 1 files that are not of this backup, such as of somebody else" in done.stderr
        store.delete_object(Bucket="mlflow", Key="of somebody else")
        key = next(entry["key"] for entry in json.loads((backups / "first" / "manifest.json").read_text())["objects"])
        store.put_object(Bucket="mlflow", Key=key, Body=b"half")  # as after an interrupted restore
        for _ in range(2):  # the second restore finds a database with tables
            done = script("scripts/stack_backup.py", "restore", str(backups / "first"), **other.data)
        assert "tables already" in done.stderr
        assert rows_of(other) == rows_of(stack)
        assert objects_of(other) == objects_of(stack)
        with running_server(other), acting_as(ann):
            again = MlflowClient(tracking_uri=other.address)
            assert again.get_run(run).data.metrics == {"val/dice": 0.9}
            assert Path(again.download_artifacts(run, "fold0/weights.bin", str(tmp_path))).read_bytes() == content
            assert again.get_model_version_by_alias(ann.name, "champion").run_id == run
    for one in (done, refused, second):
        assert stack.settings["POSTGRES_PASSWORD"] not in one.stdout + one.stderr
    assert stack.settings["S3_SECRET_KEY"] not in (backups / "first" / "manifest.json").read_text()
    assert json.loads((backups / "first" / "manifest.json").read_text())["objects"]


def rows_of(stack: Stack) -> list[str]:
    """Return every row of the database as text."""
    dump = ["pg_dump", "--data-only", "--inserts", "--no-owner"]
    done = subprocess.run(dump, env=clean_environment() | stack.data, capture_output=True, text=True, check=True)
    return sorted(line for line in done.stdout.splitlines() if line.startswith("INSERT"))


def objects_of(stack: Stack) -> set[tuple[str, int, str]]:
    entries = bucket_of(stack).list_objects_v2(Bucket=stack.settings["S3_BUCKET"]).get("Contents", [])
    return {(entry["Key"], entry["Size"], entry["ETag"]) for entry in entries}
