"""The images of docker/Dockerfile and the stack of docker/compose.yaml in a real Docker engine: `make stack-test`."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from check_stack import User, acting_as
from mlflow import MlflowClient

from tests.conftest import ROOT
from tests.container_helpers import (
    SERVICES,
    Builder,
    ContainerStack,
    Engine,
    container_stack,
    context_with,
    docker_engine,
    download_wheels,
    provide_base_images,
    why_no_engine,
)
from tests.e2e.conftest import MEASUREMENTS
from tests.fault_helpers import ended, is_whole, training
from tests.project_helpers import SMALL, Project, clean_environment, copy_of, until
from tests.stack_helpers import new_user

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.containers]

OLDER_MLFLOW = "3.16.1"
"""A release with two migrations of the database less than the locked one."""
MLFLOW = next(
    line.split("==")[1] for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("mlflow==")
)
SERVER, BACKUP, TRAINER = f"prostate-seg/mlflow:{MLFLOW}", f"prostate-seg/stack-backup:{MLFLOW}", "prostate-seg:test"
OLDER_SERVER = f"prostate-seg/mlflow:{OLDER_MLFLOW}"
IMAGES = {TRAINER: "trainer", SERVER: "server", BACKUP: "backup"}
OWNER = 1234 if os.geteuid() == 0 else os.getuid()
"""User of the host to whom the workspace of the trainer belongs; no user of the image has this number."""

Report = Callable[[str, str], None]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Report:
    """Return a function that adds a row to the table after the tests."""
    rows = request.config.stash[MEASUREMENTS]
    return lambda what, value: rows.append((what, value))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "wheels"
    download_wheels(folder, mlflow=OLDER_MLFLOW)
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    reason = why_no_engine()
    if reason:
        pytest.skip(reason)
    with docker_engine(tmp_path_factory.mktemp("docker")) as running:
        yield running


@pytest.fixture(scope="module")
def builder(engine: Engine, wheels: Path, tmp_path_factory: pytest.TempPathFactory, report: Report) -> Builder:
    """Build the images once."""
    start = time.monotonic()
    folder = tmp_path_factory.mktemp("images")
    version = engine.output("version", "--format", "{{.Server.Version}}")
    compose = engine.output("compose", "version", "--short")
    report(
        "engine", f"Docker {version}, Compose {compose}, {'of the tests' if engine.is_of_tests else 'of this machine'}"
    )
    stand_ins = provide_base_images(engine, folder, wheels)
    report("stand-ins for base images", ", ".join(stand_ins) or "none")
    done = Builder(engine, wheels)
    start = _reported(report, "base images", start)
    older = context_with(folder / "older", mlflow=OLDER_MLFLOW)
    images = {**{tag: (target, ROOT) for tag, target in IMAGES.items()}, OLDER_SERVER: ("server", older)}
    done.build_all(images)
    _reported(report, "images trainer, server, backup and an older server", start)
    return done


@contextmanager
def timed(report: Report, what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    _reported(report, what, start)


def _reported(report: Report, what: str, start: float) -> float:
    report(what, f"{time.monotonic() - start:.0f} s")
    return time.monotonic()


@pytest.fixture(scope="module")
def stack(
    engine: Engine, builder: Builder, tmp_path_factory: pytest.TempPathFactory, report: Report
) -> Iterator[ContainerStack]:
    """Return a running stack of profile full."""
    with container_stack(engine, tmp_path_factory.mktemp("stack") / "docker") as made:
        with timed(report, "profile full, from nothing to healthy"):
            made.up()
        yield made


def check_stack(stack: ContainerStack) -> list[str]:
    """Run scripts/check_stack.py, and return its lines."""
    command = [sys.executable, ROOT / "scripts" / "check_stack.py", "--megabytes", "20"]
    env = clean_environment() | stack.login
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("image", IMAGES)
def test_image_has_no_root_and_no_secret(
    engine: Engine, builder: Builder, report: Report, tmp_path: Path, image: str
) -> None:
    found = engine.inspect(image)
    assert found["Config"]["User"] == "1000:1000"
    archive = tmp_path / "image.tar"
    engine.run("save", "--output", archive, image)
    assert builder.secret.encode() not in engine.output("history", "--no-trunc", image).encode()
    secret_files = [name for name, content in _files_of(archive) if builder.secret.encode() in content]
    assert secret_files == []
    report(
        f"image {IMAGES[image]}", f"{found['Size'] / 1e6:.0f} MB in {len(found['RootFS']['Layers'])} layers, user 1000"
    )


def _files_of(image: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every file of every layer that can be a text with a secret, and the description of the image."""
    with tarfile.open(image) as outer:
        for member in outer:
            stream = outer.extractfile(member) if member.isfile() else None
            if stream is None:
                continue
            if stream.read(512)[257:262] != b"ustar":
                stream.seek(0)
                yield member.name, stream.read()
                continue
            stream.seek(0)
            with tarfile.open(fileobj=stream) as layer:
                for inner in layer:
                    if inner.isfile() and inner.size < 2**20:
                        content = layer.extractfile(inner)
                        assert content is not None
                        yield f"{member.name}/{inner.name}", content.read()


def test_search_for_secrets_finds_a_copied_one(engine: Engine, builder: Builder, tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "pip.conf").write_text(f"password {builder.secret}")
    (tmp_path / "context" / "Dockerfile").write_text(
        f"FROM {SERVER}\nCOPY --chown=1000:1000 pip.conf /home/app/\nRUN rm /home/app/pip.conf\n"
    )
    engine.run("build", "--quiet", "--tag", "leaking", tmp_path / "context")
    engine.run("save", "--output", tmp_path / "image.tar", "leaking")
    found = [name for name, content in _files_of(tmp_path / "image.tar") if builder.secret.encode() in content]
    assert [name.rsplit("/", 1)[1] for name in found] == ["pip.conf"]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A clone of this checkout that belongs to a user of the host."""
    folder = tmp_path / "workspace"
    if (ROOT / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", folder], check=True)
    else:
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "demo", "docs", "tests"))
    _belongs_to(folder, OWNER)
    return folder


def _belongs_to(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)


def in_trainer(workspace: Path, *arguments: str) -> list[str | Path]:
    """Return the arguments of `docker run` of docs/server.md, as the owner of the workspace."""
    user = ["--user", f"{OWNER}:{OWNER}"]
    return ["run", "--init", *user, "--volume", f"{workspace}:/work", *arguments]


def test_trainer_runs_the_demo_in_a_workspace_of_another_user(
    engine: Engine, builder: Builder, workspace: Path, report: Report
) -> None:
    arguments = ["--rm", "--entrypoint", "scripts/demo.sh", TRAINER, "/opt/venv/bin/python"]
    with timed(report, "make demo's pipeline in the trainer"):
        done = engine.run(*in_trainer(workspace, *arguments))
    written = done.stdout + done.stderr
    assert "dubious ownership" not in written
    assert "Traceback" not in written
    demo = workspace / "demo"
    dice = json.loads((demo / "evaluation" / "metrics.json").read_text())["pooled"]["dice"]["mean"]
    report("Dice of the demo in the trainer", f"{dice:.3f}")
    assert dice > 0.9
    assert (demo / "report" / "report.html").is_file()
    assert {path.lstat().st_uid for path in demo.rglob("*")} == {OWNER}
    client = MlflowClient(tracking_uri=f"sqlite:///{demo}/mlflow.db")
    experiment = client.get_experiment_by_name("prostate_seg")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    git = ["git", "-c", "safe.directory=*", "-C", demo, "log", "--format=%H %s"]
    commits = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    recorded = {run.data.tags["git.commit"] for run in runs if "git.commit" in run.data.tags}
    assert recorded
    assert all(commit in commits for commit in recorded)


def test_trainer_records_the_commit_of_a_repository_of_another_user(
    engine: Engine, builder: Builder, workspace: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give the repository to another user")
    _belongs_to(workspace / ".git", 0)
    done = engine.run(*in_trainer(workspace, "--rm", TRAINER, "stage=fetch", *SMALL))
    assert "dubious ownership" not in done.stdout + done.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{workspace}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("prostate_seg").experiment_id], "tags.level = 'stage'")
    head = ["git", "-c", "safe.directory=*", "-C", workspace, "rev-parse", "HEAD"]
    assert [run.data.tags["git.commit"] for run in runs] == [subprocess.check_output(head, text=True).strip()]


def test_stopped_trainer_closes_its_run_and_continues_at_the_next_start(
    engine: Engine, builder: Builder, tmp_path: Path, report: Report
) -> None:
    workspace, name = tmp_path / "work", f"trainer-{secrets.token_hex(3)}"
    workspace.mkdir()
    _belongs_to(workspace, OWNER)
    engine.run(*in_trainer(workspace, "--rm", TRAINER, "-m", "stage=fetch,preprocess,prepare", *SMALL))
    settings = [*SMALL, "fold.index=0", "train.max_epochs=30", "train.steps_per_epoch=8"]
    one_thread = ["--env", "OMP_NUM_THREADS=1"]
    engine.run(*in_trainer(workspace, "--detach", "--name", name, *one_thread, TRAINER, "stage=train", *settings))
    try:
        until(lambda: len(_epochs(engine, name)) > 3, 120)
        with timed(report, "docker stop of a training"):
            engine.run("stop", "--time", "30", name)
        assert engine.inspect(name)["State"]["ExitCode"] == 128 + signal.SIGTERM
        assert _statuses(workspace) == {"stage": ["KILLED"], "fold": ["KILLED"]}
        stopped_after = max(_epochs(engine, name))
        assert stopped_after < 30
        engine.run("start", name)
        until(lambda: not engine.inspect(name)["State"]["Running"], 600)
        state, written = engine.inspect(name)["State"], _log(engine, name)
        assert state["ExitCode"] == 0, written
        assert f"go on after epoch {stopped_after}, where training was stopped" in written
        assert _statuses(workspace) == {"stage": ["FINISHED"], "fold": ["FINISHED"]}
    finally:
        engine.run("rm", "--force", name, check=False)
    assert {path.lstat().st_uid for path in workspace.rglob("*")} == {OWNER}


def _log(engine: Engine, name: str) -> str:
    done = engine.run("logs", name)
    return done.stdout + done.stderr


def _epochs(engine: Engine, name: str) -> list[int]:
    return [int(epoch) for epoch in re.findall(r"^   0 +(\d+) +[\d.]+ ", _log(engine, name), re.MULTILINE)]


def _statuses(workspace: Path) -> dict[str, list[str]]:
    """Return the statuses of the runs of stage train by level."""
    client = MlflowClient(tracking_uri=f"sqlite:///{workspace}/mlflow.db")
    experiment = client.get_experiment_by_name("prostate_seg")
    assert experiment is not None
    found: dict[str, list[str]] = {}
    for run in client.search_runs([experiment.experiment_id], "tags.stage = 'train'"):
        found.setdefault(run.data.tags["level"], []).append(run.info.status)
    return found


def test_services_start_in_the_order_of_their_dependencies(stack: ContainerStack) -> None:
    started = {service: stack.state(service)["State"]["StartedAt"] for service in SERVICES}
    healthy = {service: stack.state(service)["State"]["Health"]["Log"] for service in SERVICES}
    assert max(started["database"], started["storage"]) < started["server"] < started["proxy"]
    assert all(log[-1]["ExitCode"] == 0 for log in healthy.values())


def test_stack_passes_its_check_through_the_proxy(stack: ContainerStack, report: Report) -> None:
    *checks, last = check_stack(stack)
    report("check of the stack as three users", f"{len(checks)} of {len(checks)} ok")
    assert last.startswith(f"{stack.address} passed")


def test_only_the_port_of_the_proxy_is_published(stack: ContainerStack) -> None:
    published = {service: stack.state(service)["HostConfig"]["PortBindings"] or {} for service in SERVICES}
    port = stack.settings["STACK_PORT"]
    assert published.pop("proxy") == {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": port}]}
    assert published == {"database": {}, "storage": {}, "server": {}}


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)"


def test_networks_separate_the_services(stack: ContainerStack, report: Report) -> None:
    """The database is not reached from the outer network, and the inner network has no way out."""

    def connects(network: str, host: str, port: int) -> bool:
        command = [
            "run",
            "--rm",
            "--network",
            f"{stack.project}_{network}",
            "--entrypoint",
            "python",
            SERVER,
            "-c",
            CONNECT,
        ]
        return stack.engine.run(*command, host, str(port), check=False).returncode == 0

    inner = stack.state("database")["NetworkSettings"]["Networks"][f"{stack.project}_inside"]["IPAddress"]
    outer = stack.state("proxy")["NetworkSettings"]["Networks"][f"{stack.project}_outside"]["IPAddress"]
    assert connects("inside", inner, 5432)
    assert connects("outside", outer, 8080)
    assert not connects("outside", inner, 5432)
    assert not connects("outside", "database", 5432)
    assert not connects("inside", outer, 8080)
    routes = stack.engine.output("exec", stack.container("storage"), "cat", "/proc/net/route").splitlines()[1:]
    assert [route for route in routes if route.split()[1] == "00000000"] == []  # no default route
    report("networks", "inside has no route out; outside does not reach database and storage")


def test_containers_have_the_restrictions_of_the_compose_file(stack: ContainerStack) -> None:
    for service in SERVICES:
        host = stack.state(service)["HostConfig"]
        assert host["SecurityOpt"] == ["no-new-privileges:true"], service
        assert host["Privileged"] is False
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert host["CapDrop"] == (None if service == "database" else ["ALL"]), service
    assert stack.state("proxy")["HostConfig"]["ReadonlyRootfs"] is True

    def inside(service: str, command: str) -> tuple[int, str]:
        done = stack.engine.run("exec", stack.container(service), "sh", "-c", command, check=False)
        return done.returncode, done.stdout.strip()

    assert inside("proxy", "touch /etc/x")[0] != 0
    assert inside("proxy", "touch /tmp/x")[0] == 0
    for service in ("storage", "server", "proxy"):
        assert inside(service, "id -u")[1] != "0", service
        assert inside(service, "grep CapEff /proc/self/status")[1].split()[1] == "0" * 16, service
    _, users = inside("database", "cat /proc/[0-9]*/status | sed -n 's/^Uid:.//p' | cut -f1 | sort -u")
    assert len(set(users.split()) - {"0"}) == 1  # the server has left root


@pytest.fixture
def ann(stack: ContainerStack) -> User:
    return new_user(stack, "ann")


def test_training_loses_nothing_while_services_are_killed_and_networks_are_cut(
    stack: ContainerStack, ann: User, prepared: Project, tmp_path: Path, report: Report
) -> None:
    project = copy_of(prepared, tmp_path / "project")
    login = {"MLFLOW_TRACKING_USERNAME": ann.name, "MLFLOW_TRACKING_PASSWORD": ann.password}
    with acting_as(ann), training(project, stack.address, **login) as watch:
        for services in (*((service,) for service in SERVICES), SERVICES):
            with timed(report, f"SIGKILL of {', '.join(services)}: healthy again after"):
                stack.kill(*services)
                until(stack.is_healthy, 180)
            watch.wait_until_replicated(seconds=120)
        for service in ("server", "database"):
            with stack.cut(service):
                watch.wait_until_store_stops()
            with timed(report, f"network of the {service} cut: healthy again after"):
                until(stack.is_healthy, 180)
            watch.wait_until_replicated(seconds=120)
        watch.process.send_signal(signal.SIGTERM)
        fold = is_whole(stack.address, output=ended(watch, code=143), status="KILLED")
        num_points = len(MlflowClient(tracking_uri=stack.address).get_metric_history(fold.info.run_id, "train/loss"))
    report("epochs logged meanwhile", f"{num_points}: lost 0, duplicated 0, out of order 0")


def written(stack: ContainerStack, ann: User, tmp_path: Path) -> Callable[[ContainerStack], None]:
    """Log a run with an artifact and a model; return a check that they are in a stack."""
    content, client = secrets.token_bytes(2**20), MlflowClient(tracking_uri=stack.address)
    (tmp_path / "weights.bin").write_bytes(content)
    name = f"{ann.name}-{secrets.token_hex(3)}"
    with acting_as(ann):
        run = client.create_run(client.create_experiment(name)).info.run_id
        client.log_metric(run, "val/dice", 0.9, step=3)
        client.log_artifact(run, str(tmp_path / "weights.bin"), "fold0")
        client.create_registered_model(name)
        client.create_model_version(name, source=client.get_run(run).info.artifact_uri, run_id=run)
        client.set_registered_model_alias(name, "champion", "1")

    def check(other: ContainerStack) -> None:
        again = MlflowClient(tracking_uri=other.address)
        with acting_as(ann):
            assert again.get_run(run).data.metrics == {"val/dice": 0.9}
            target = tmp_path / secrets.token_hex(3)
            target.mkdir()
            assert Path(again.download_artifacts(run, "fold0/weights.bin", str(target))).read_bytes() == content
            assert again.get_model_version_by_alias(name, "champion").run_id == run

    return check


def test_volumes_survive_down_and_up(stack: ContainerStack, ann: User, tmp_path: Path, report: Report) -> None:
    check = written(stack, ann, tmp_path)
    stack.compose("down")
    assert stack.engine.run("inspect", stack.container("server"), check=False).returncode != 0
    with timed(report, "up after down"):
        stack.up()
    check(stack)


def test_backup_is_restored_into_an_empty_stack(
    stack: ContainerStack, ann: User, tmp_path: Path, report: Report
) -> None:
    check = written(stack, ann, tmp_path)
    user = {"STACK_UID": str(OWNER), "STACK_GID": str(OWNER)}
    backups = stack.folder / "backups"
    os.chown(backups, OWNER, OWNER)
    with timed(report, "make stack-backup"):
        saved = stack.compose("run", "--rm", "backup", "save", "/backups/first", **user)
    assert "the database and" in saved.stdout
    assert {path.stat().st_uid for path in (backups / "first").rglob("*")} == {OWNER}
    refused = stack.compose("run", "--rm", "backup", "restore", "/backups/first", check=False, **user)
    assert refused.returncode == 1
    assert "only an empty stack is restored" in refused.stderr
    keys = {name: value for name, value in stack.settings.items() if name.endswith(("KEY", "PASSWORD"))}
    with container_stack(stack.engine, tmp_path / "docker", **keys) as other:
        shutil.copytree(backups / "first", other.folder / "backups" / "first", copy_function=shutil.copy2)
        _belongs_to(other.folder / "backups", OWNER)
        with timed(report, "make stack-restore into empty volumes"):
            other.compose("run", "--rm", "backup", "restore", "/backups/first", **user)
        other.up()
        check(other)
        assert check_stack(other)[-1].startswith(f"{other.address} passed")


def test_stack_of_an_older_mlflow_is_upgraded(engine: Engine, builder: Builder, tmp_path: Path, report: Report) -> None:
    with container_stack(engine, tmp_path / "docker") as stack:
        stack.use_images(server=OLDER_SERVER)
        stack.up()
        assert _version(stack) == OLDER_MLFLOW
        check = written(stack, new_user(stack, "ann"), tmp_path)
        # docs/server.md: a backup, the upgrade of the tables with the new checkout, and the new stack
        stack.compose("run", "--rm", "backup", "save", "/backups/before", STACK_UID="0", STACK_GID="0")
        stack.use_images()
        with timed(report, f"upgrade of the tables from MLflow {OLDER_MLFLOW} to {MLFLOW}"):
            stack.compose("run", "--rm", "server", "upgrade")
        stack.up()
        assert _version(stack) == MLFLOW
        check(stack)
        assert check_stack(stack)[-1].startswith(f"{stack.address} passed")


def _version(stack: ContainerStack) -> str:
    return requests.get(f"{stack.address}/version", auth=tuple(stack.login.values())[1:], timeout=30).text


def test_profile_local_keeps_its_runs(engine: Engine, builder: Builder, tmp_path: Path, report: Report) -> None:
    with container_stack(engine, tmp_path / "docker", COMPOSE_PROFILES="local") as stack:
        with timed(report, "profile local, from nothing to healthy"):
            stack.up()
        assert check_stack(stack)[-1].startswith(f"{stack.address} passed")
        check = written(stack, new_user(stack, "ann"), tmp_path)
        stack.compose("down")
        stack.up()
        check(stack)
