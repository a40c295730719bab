"""Run Python programs in a fork of a process that has already imported torch, MONAI and MLflow.

The command line, the environment, the working folder, signals and the exit code are those of a separate process; only the
imports of the libraries, 4 to 8 seconds of a core, are done once for all commands of a test worker. Nothing of prostate_seg is
imported before the fork.

The file is three programs: a module for tests (`ForkedProcess`), the server (`python fork_server.py serve SOCKET`), and a
`python` for other programs' subprocesses, as DVC's stages (`python_folder`).
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
import threading
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO, TextIO

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
    *(
        "torch",
        "torch._inductor",
        "monai.losses",
        "monai.networks.nets",
        "monai.inferers",
        "mlflow",
        "mlflow.pyfunc",
        "hydra",
        "optuna",
    ),
    *(
        "mlflow.store.tracking.sqlalchemy_store",
        "sklearn.model_selection",
        "dvc_data.hashfile.build",
        "safetensors.torch",
    ),
)
READY = b"ready"
IS_AVAILABLE = hasattr(os, "fork")


class ForkedProcess:
    """A forked program, with the part of `subprocess.Popen`'s interface that tests use; stdout has stderr in it.

    Args:
        program: `-m MODULE` or a file.
        arguments: Of the program.
        folder: Its working folder.
        environment: All of its environment.
        files: Descriptors of its stdout and stderr; by default one pipe, which `stdout` reads.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        folder: Path,
        environment: dict[str, str],
        files: tuple[int, int] | None = None,
    ) -> None:
        self.args = [sys.executable, *program.split(), *arguments]
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        if files is None:
            read, write = os.pipe()
            self.stdout, files = os.fdopen(read), (write, write)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(_address())
        self._answers = _request(self._server, program, arguments, folder, environment, files)
        if self.stdout is not None:
            os.close(files[0])
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                self.returncode = int(self._answers.readline())
            except TimeoutError:
                self._answers = self._server.makefile()  # one that has timed out cannot be read again
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.001)
        return None

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Return what the program has written, once it has ended.

        Raises:
            subprocess.TimeoutExpired: If it has not ended in time.
        """
        assert self.stdout is not None
        texts: list[str] = []
        reader = threading.Thread(target=lambda: texts.append(self.stdout.read() if self.stdout else ""), daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(30)
        return texts[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(
    program: str, arguments: Sequence[str], *, folder: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a program as `subprocess.run(capture_output=True, text=True)` would.

    Raises:
        subprocess.TimeoutExpired: If the command has not ended in time; it is killed.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        files = (stdout.fileno(), stderr.fileno())
        process = ForkedProcess(program, arguments, folder=folder, environment=environment, files=files)
        try:
            returncode = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(process.args, returncode, *texts)


@cache
def python_folder() -> Path:
    """Return a folder, for a PATH, with a `python` that forks `python -m prostate_seg`; the interpreter's own without fork."""
    if not IS_AVAILABLE:
        return Path(sys.executable).parent
    folder = Path(_address()).parent / "bin"
    folder.mkdir()
    python = folder / "python"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -ISs '{__file__}' python '{_address()}' \"$@\"\n")
    python.chmod(0o755)
    return folder


def _as_python(address: str, arguments: list[str]) -> int:
    """Run as `python ARGUMENTS`; return the exit code, or minus the number of the signal that ended the program."""
    words = arguments[1:] if arguments[:1] == ["-u"] else arguments  # torchrun writes python -u
    if words[:2] != ["-m", "prostate_seg"]:
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        answers = _request(server, "-m prostate_seg", words[2:], Path.cwd(), dict(os.environ), (1, 2))
        job = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(job, number))
        return int(answers.readline())


def _request(
    server: socket.socket,
    program: str,
    arguments: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    files: tuple[int, int],
) -> TextIO:
    """Ask a connected server for a program; return the stream that has its process id and then its exit code."""
    request = {"program": program, "arguments": list(arguments), "folder": str(folder), "environment": environment}
    text = json.dumps(request).encode()
    socket.send_fds(server, [f"{len(text):08d}".encode()], files)
    server.sendall(text)
    return server.makefile()


@cache
def _address() -> str:
    """Start the server of this test worker, and return the path of its socket."""
    folder = tempfile.mkdtemp(prefix="fork-server-")
    address = f"{folder}/socket"
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen([sys.executable, __file__, "serve", address], stdout=subprocess.PIPE, env=quiet)
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
    # Streams remember whether their first file could be sought.
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False, buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a background job of a shell
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[arg-type]
    program = str(request["program"]).removeprefix("-m ")
    sys.argv = [program, *request["arguments"]]  # type: ignore[misc]
    if threads := os.environ.get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(threads))  # torch read the server's variable when it was imported
    sys.path[:1] = [str(request["folder"]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    code: object = 0
    try:
        if program == request["program"]:
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
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
    if sys.argv[1] == "serve":
        _serve(sys.argv[2])
    else:
        result = _as_python(sys.argv[2], sys.argv[3:])
        if result < 0:
            signal.signal(-result, signal.SIG_DFL)
            os.kill(os.getpid(), -result)
        sys.exit(result)
