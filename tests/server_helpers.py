"""Servers for the duration of a test, on free local ports: MLflow, Postgres, S3."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from tests.project_helpers import clean_environment, free_port, until, uses_stack

FIRST_CALL = "api/2.0/mlflow/experiments/search?max_results=1"
"""Path of a call of the store: a server that answers it has opened its database, unlike one that answers /health."""


@contextmanager
def mlflow_server(folder: Path, *, store: str | None = None, num_workers: int = 1) -> Iterator[str]:
    """Start an MLflow server with its own artifacts, and its own database unless one is given.

    With pytest's option --stack it is the server stack, and this process is logged in as a plain user meanwhile.
    """
    if uses_stack():
        from check_stack import acting_as

        from tests.stack_helpers import new_user, running_stack  # which imports this module

        with running_stack(folder) as stack, acting_as(new_user(stack, "launcher")):
            yield stack.address
        return
    folder.mkdir()
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", str(num_workers), "--backend-store-uri", store or f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=clean_environment(), start_new_session=True
        )
    try:
        until(lambda: answers(f"{address}/{FIRST_CALL}"), 90)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Start an S3 server that stores its files in memory, and yield its address."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(address), 60)
        yield address
    finally:
        process.terminate()
        process.wait(20)


POSTGRES_PROGRAMS = ("initdb", "postgres", "pg_isready", "createdb")


def why_no_postgres() -> str | None:
    """Return the reason if no Postgres server can be started, else None."""
    return None if postgres_programs() else f"not installed: {', '.join(POSTGRES_PROGRAMS)} (Debian's postgresql)"


def postgres_programs() -> Path | None:
    """Return the newest folder with Postgres' programs; on Debian they are not on the PATH."""
    folders = [*map(Path, os.environ["PATH"].split(os.pathsep)), *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    found = [folder for folder in folders if all((folder / program).is_file() for program in POSTGRES_PROGRAMS)]
    return found[-1] if found else None


@contextmanager
def postgres_server(*databases: str, role: str = "tests", password: str | None = None) -> Iterator[dict[str, str]]:
    """Start a Postgres server with empty databases, and yield their addresses by name; a given password is required."""
    programs, port = postgres_programs(), free_port()
    assert programs is not None
    user = "nobody" if os.geteuid() == 0 else None  # Postgres refuses root
    with tempfile.TemporaryDirectory(prefix="postgres") as name:
        folder = Path(name) / "data"
        folder.mkdir()
        if user:
            Path(name).chmod(0o755)
            shutil.chown(folder, user)
        initdb = [programs / "initdb", "--no-sync", f"--username={role}", "--encoding=UTF8", folder]
        subprocess.run(
            [*initdb, *_authentication(Path(name), password)], check=True, capture_output=True, user=user, cwd=name
        )
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off"]
        command = [programs / "postgres", "-D", folder, *options]
        with (Path(name) / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, user=user, cwd=name)
        there = ["--host=127.0.0.1", f"--port={port}", f"--username={role}"]
        login = os.environ | ({"PGPASSWORD": password} if password else {})
        try:
            ready = [programs / "pg_isready", *there]
            until(lambda: subprocess.run(ready, check=False, capture_output=True).returncode == 0, 30)
            for database in databases:
                subprocess.run([programs / "createdb", *there, database], check=True, env=login)
            account = f"{role}:{quote(password, safe='')}" if password else role
            yield {database: f"postgresql+psycopg2://{account}@127.0.0.1:{port}/{database}" for database in databases}
        finally:
            process.send_signal(signal.SIGINT)  # fast shutdown of Postgres, which ends open sessions
            process.wait(30)


def _authentication(folder: Path, password: str | None) -> list[str]:
    """Return initdb's options: trust local connections, or require the password."""
    if password is None:
        return ["--auth=trust"]
    file = folder / "password"
    file.write_text(password)
    file.chmod(0o644)  # readable by the user of Postgres; the folder is removed after the test
    return ["--auth=scram-sha-256", f"--pwfile={file}"]
