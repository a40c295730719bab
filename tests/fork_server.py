"""Run `python -m prostate_seg` in a fork of a process that has already imported torch, MONAI and MLflow.

The command line, the environment, the working folder, signals and the exit code are those of a separate process; only the
imports of the libraries, 4 to 8 seconds of a core, are done once for all commands of a test worker. Nothing of prostate_seg is
imported before the fork.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path

LIBRARIES = (
    *(
        "numpy",
        "pandas",
        "scipy.ndimage",
        "scipy.stats",
        "SimpleITK",
        "nibabel",
        "matplotlib.figure",
        "yaml",
        "rich.progress",
    ),
    *("torch", "monai.losses", "monai.networks.nets", "monai.inferers", "mlflow", "mlflow.pyfunc", "hydra", "optuna"),
    *(
        "mlflow.store.tracking.sqlalchemy_store",
        "sklearn.model_selection",
        "dvc_data.hashfile.build",
        "safetensors.torch",
    ),
)
READY = b"ready"
IS_AVAILABLE = hasattr(os, "fork")


def run_forked(
    arguments: Sequence[str], *, folder: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `python -m prostate_seg` with arguments in a folder, as `subprocess.run(capture_output=True, text=True)` would.

    Raises:
        subprocess.TimeoutExpired: If the command has not ended in time; it is then killed.
    """
    command = [sys.executable, "-m", "prostate_seg", *arguments]
    with (
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
        socket.socket(socket.AF_UNIX) as server,
    ):
        server.connect(_address())
        request = json.dumps({"arguments": list(arguments), "folder": str(folder), "environment": environment})
        socket.send_fds(server, [f"{len(request.encode()):08d}".encode()], [stdout.fileno(), stderr.fileno()])
        server.sendall(request.encode())
        with server.makefile() as answers:
            job = int(answers.readline())
            server.settimeout(timeout)
            try:
                returncode = int(answers.readline())
            except TimeoutError:
                os.kill(job, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout) from None
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(command, returncode, *texts)


@cache
def _address() -> str:
    """Start the server of this test worker, and return the path of its socket."""
    folder = tempfile.mkdtemp(prefix="fork-server-")
    address = f"{folder}/socket"
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE, env=quiet)
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.kill)
    assert server.stdout is not None
    assert server.stdout.read(len(READY)) == READY, "the fork server did not start"
    return address


def _serve(address: str) -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(1, READY)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _watch(connection)
                os._exit(0)
            connection.close()


def _watch(connection: socket.socket) -> None:
    """Fork the command, and send its process id and then its exit code."""
    length, files, _, _ = socket.recv_fds(connection, 8, 2)
    with connection.makefile("rb") as stream:
        request = json.loads(stream.read(int(length)))
    job = os.fork()
    if job == 0:
        connection.close()
        _become_command(request, files)
    connection.sendall(f"{job}\n".encode())
    _, status = os.waitpid(job, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become_command(request: dict[str, object], files: list[int]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[arg-type]
    sys.argv = ["prostate_seg", *request["arguments"]]  # type: ignore[misc]
    sys.path[:1] = [str(request["folder"]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    code: object = 0
    try:
        runpy.run_module("prostate_seg", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    _serve(sys.argv[1])
