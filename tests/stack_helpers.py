"""The stack of docker/compose.yaml as plain processes: the same commands, environment and nginx file, without containers.

Postgres, nginx and `mlflow server` are those of the images; moto's S3 server replaces RustFS. What
differs is listed in one place: the addresses, which in Docker are names of containers.
"""

import os
import re
import secrets
import shutil
import signal
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

import boto3
import yaml
from check_stack import User, acting_as
from mlflow.server import get_app_client
from stack_settings import login_of, make_settings, read_settings

from tests.conftest import ROOT
from tests.project_helpers import free_port, until
from tests.server_helpers import answers, postgres_programs, postgres_server, s3_server, why_no_postgres

DOCKER = ROOT / "docker"
MAIN_NGINX_CONF = """
daemon off;
user root;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{}}
http {{
    access_log {folder}/nginx.access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/default.conf;
}}
"""
"""Main configuration of nginx's image, which includes our file."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A running stack."""

    folder: Path
    """Folder of its logs and settings."""
    settings: dict[str, str]
    """Settings of its docker/.env."""
    database: dict[str, str]
    """libpq's environment."""

    @property
    def address(self) -> str:
        return self.login["MLFLOW_TRACKING_URI"]

    @property
    def login(self) -> dict[str, str]:
        """Return the environment of a client with the administrator's login."""
        return login_of(self.settings)

    @property
    def data(self) -> dict[str, str]:
        """Return the environment of scripts that use the database, the bucket and Postgres' programs."""
        names = ("S3_ENDPOINT_URL", "S3_BUCKET", "S3_REGION", "S3_ACCESS_KEY", "S3_SECRET_KEY")
        path = os.pathsep.join([str(postgres_programs()), os.environ["PATH"]])
        return {name: self.settings[name] for name in names} | self.database | {"PATH": path}

    def written(self) -> str:
        """Return the logs of the server and nginx."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))


def administrator(stack: Stack) -> User:
    return User(name=stack.login["MLFLOW_TRACKING_USERNAME"], password=stack.login["MLFLOW_TRACKING_PASSWORD"])


def new_user(stack: Stack, name: str) -> User:
    user = User(name=f"{name}-{secrets.token_hex(3)}", password=secrets.token_urlsafe(12))
    with acting_as(administrator(stack)):
        get_app_client("basic-auth", tracking_uri=stack.address).create_user(user.name, user.password)
    return user


def why_no_stack() -> str | None:
    """Return the reason if the stack cannot be started, else None."""
    return why_no_postgres() or (None if shutil.which("nginx") else "not installed: nginx (Debian's nginx-light)")


def compose(settings: dict[str, str]) -> dict[str, Any]:
    """Return docker/compose.yaml with interpolated settings, as Docker does."""

    def fill(match: re.Match[str]) -> str:
        name, kind, default = match.groups()
        value = settings.get(name, "")
        assert value or kind != "?", f"{name} is not set: {default}"
        return value or default

    text = re.sub(r"\$\{(\w+):([-?])([^}]*)\}", fill, (DOCKER / "compose.yaml").read_text())
    parsed = yaml.safe_load(text)
    assert isinstance(parsed, dict)
    return parsed


@dataclass(frozen=True, slots=True)
class ProjectStack:
    """Stack of a project, and the login of its user."""

    stack: Stack
    plain_user: str
    """Address with name and password."""


_of_projects: dict[Path, tuple[ProjectStack, ExitStack]] = {}


def stack_of(project: Path) -> ProjectStack:
    """Return the stack of a project's folder; the first call starts it."""
    if project not in _of_projects:
        with ExitStack() as services:
            logs = Path(services.enter_context(TemporaryDirectory()))
            stack = services.enter_context(running_stack(logs / "stack"))
            user = new_user(stack, "launcher")
            address = stack.address.replace("://", f"://{user.name}:{user.password}@")
            _of_projects[project] = ProjectStack(stack=stack, plain_user=address), services.pop_all()
    return _of_projects[project][0]


def stop_stacks_of_projects(folder: Path) -> None:
    """Stop the stacks of projects in a folder."""
    for project in [one for one in _of_projects if one.is_relative_to(folder)]:
        _of_projects.pop(project)[1].close()


@contextmanager
def running_stack(folder: Path) -> Iterator[Stack]:
    """Start a new stack of profile s3."""
    with empty_stack(folder) as stack, running_server(stack):
        yield stack


@contextmanager
def empty_stack(folder: Path) -> Iterator[Stack]:
    """Start an empty database and an empty S3 store, without a server."""
    folder.mkdir()
    with ExitStack() as services:
        storage = services.enter_context(s3_server(folder))
        port = free_port()
        own = {"COMPOSE_PROFILES": "s3", "STACK_PORT": str(port), "STACK_WORKERS": "1", "S3_ENDPOINT_URL": storage}
        names = {"STACK_HOSTS": f"127.0.0.1:{port}", "STACK_ORIGINS": f"http://127.0.0.1:{port}"}
        make_settings(folder / ".env", **own, **names)
        settings = read_settings(folder / ".env")
        server = compose(settings)["services"]["server"]
        role, name = (server["environment"][f"POSTGRES_{key}"] for key in ("USER", "DB"))
        databases = services.enter_context(postgres_server(name, role=role, password=settings["POSTGRES_PASSWORD"]))
        yield Stack(folder=folder, settings=settings, database=libpq(databases[name]))


@contextmanager
def running_server(stack: Stack) -> Iterator[None]:
    """Start MLflow behind nginx, with the database and the bucket of the stack."""
    services, port = compose(stack.settings)["services"], free_port()
    environment = server_environment(stack)
    arguments = [moved(argument, port) for argument in services["server"]["command"]]
    command = [sys.executable, str(DOCKER / "start_mlflow.py"), *arguments]
    proxy = changed(
        services["proxy"]["environment"], MLFLOW_ADDRESS=f"127.0.0.1:{port}", PROXY_PORT=stack.settings["STACK_PORT"]
    )
    with (
        _process(command, stack.folder / "server.log", environment=environment),
        _process(_nginx(stack.folder, proxy), stack.folder / "proxy.log", environment={}),
    ):
        until(lambda: answers(f"{stack.address}/health"), 120)
        yield


def bucket_of(stack: Stack) -> Any:
    """Return a client of the S3 store behind the server."""
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=stack.settings["S3_ENDPOINT_URL"], **keys)


def server_environment(stack: Stack) -> dict[str, str]:
    """Return the environment of the server's container."""
    there = {"POSTGRES_HOST": stack.database["PGHOST"], "POSTGRES_PORT": stack.database["PGPORT"]}
    return changed(compose(stack.settings)["services"]["server"]["environment"], **there)


def moved(argument: str, port: int) -> str:
    """Return the server's command with a local address and another port."""
    name = argument.partition("=")[0]
    return {"--host": "--host=127.0.0.1", "--port": f"--port={port}"}.get(name, argument)


def changed(environment: dict[str, str], **others: str) -> dict[str, str]:
    """Return the environment with other values for existing names."""
    assert set(others) <= set(environment)
    return {name: str(value) for name, value in environment.items()} | others


def libpq(address: str) -> dict[str, str]:
    """Return the environment of Postgres' programs for the database of an address."""
    parts = urlsplit(address)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    place = {"PGHOST": str(parts.hostname), "PGPORT": str(parts.port), "PGDATABASE": parts.path[1:]}
    return place | {"PGUSER": user, "PGPASSWORD": password}


def _nginx(folder: Path, environment: dict[str, str]) -> list[str]:
    template = (DOCKER / "nginx.conf.template").read_text()
    (folder / "default.conf").write_text(string.Template(template).safe_substitute(environment))
    (folder / "nginx.conf").write_text(MAIN_NGINX_CONF.format(folder=folder))
    return [str(shutil.which("nginx")), "-c", str(folder / "nginx.conf"), "-e", str(folder / "nginx.log")]


@contextmanager
def _process(command: list[str], log: Path, *, environment: dict[str, str]) -> Iterator[None]:
    """Run a command in the environment of a container only."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with log.open("a") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, cwd=log.parent, env=kept | environment, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
