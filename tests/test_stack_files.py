"""docker/: rules of linters of compose files and Dockerfiles, and our own; the failing side of each rule is tested."""

import copy
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stack_settings
import yaml

from tests.conftest import ROOT
from tests.stack_helpers import compose

DOCKER = ROOT / "docker"
EXAMPLE = stack_settings.read_settings(DOCKER / ".env.example")
DATA = {
    "postgres": "/var/lib/postgresql/data",
    "rustfs/rustfs": "/data",
    "prostate-seg/mlflow": "/var/lib/mlflow",
    "dpage/pgadmin4": "/var/lib/pgadmin",
}
"""Folder of each image that needs a volume."""

Compose = dict[str, Any]


def compose_problems(file: Compose, settings: dict[str, str]) -> list[str]:
    """Return the problems of a compose file."""
    found = [
        f"{name}: {problem}" for name, service in file["services"].items() for problem in service_problems(service)
    ]
    mounts = [mount for service in file["services"].values() for mount in service.get("volumes", [])]
    used = {mount.split(":")[0] for mount in mounts} - {mount.split(":")[0] for mount in mounts if mount[0] in "./~"}
    found += [f"volume {name}: declared or used, not both" for name in used ^ set(file["volumes"])]
    if not file["networks"]["inside"].get("internal"):
        found.append("the inner network leads outside")
    variables = set(re.findall(r"\$\{(\w+)", yaml.safe_dump(file)))
    found += [f"{name}: not in .env.example" for name in variables - {*settings, "STACK_UID", "STACK_GID"}]
    return found + [f"{name}: in .env.example, not used" for name in set(settings) - variables - {"COMPOSE_PROFILES"}]


def service_problems(service: Compose) -> list[str]:
    """Return the problems of a service."""
    image, tag = service.get("image", "").rsplit(":", 1) if ":" in service.get("image", "") else ("", "")
    is_command = service.get("restart") == "no"
    rules = {
        "its image has no full version": not re.match(r"\d+\.\d+", tag) and "@sha256" not in tag,
        "no healthcheck": not is_command and not service.get("healthcheck", {}).get("test"),
        "does not come back after a reboot": not is_command and service.get("restart") != "unless-stopped",
        "may gain privileges": "no-new-privileges:true" not in service.get("security_opt", []),
        "has the machine's rights": any(key in service for key in ("privileged", "network_mode", "pid", "cap_add")),
        "writes a log without end": "max-size" not in service.get("logging", {}).get("options", {}),
        "listens beyond this machine": [port for port in service.get("ports", []) if not local(port)],
        "has a secret in the file": [
            name
            for name, value in service.get("environment", {}).items()
            if re.search("PASSWORD|SECRET|_KEY", name) and not re.fullmatch(r"\$\{\w+:(-|\?[^}]*)\}", str(value))
        ],
        "keeps its data outside of a volume": image in DATA
        and "POSTGRES_HOST" not in service.get("environment", {})
        and DATA[image] not in [mount.split(":")[1] for mount in service.get("volumes", [])],
        "can reach docker": "docker.sock" in str(service),
    }
    return [rule for rule, is_broken in rules.items() if is_broken]


def local(port: str) -> bool:
    return port.startswith(("127.0.0.1:", "${STACK_ADDRESS:-127.0.0.1}:"))


@pytest.fixture(scope="module")
def compose_file() -> Compose:
    parsed = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert isinstance(parsed, dict)
    return parsed


def test_compose_file_keeps_the_rules(compose_file: Compose) -> None:
    assert compose_problems(compose_file, EXAMPLE) == []


def _set(*path: str, to: Any) -> Callable[[Compose], None]:
    def change(file: Compose) -> None:
        *folders, name = path
        for folder in folders:
            file = file[folder]
        file[name] = to

    return change


MISTAKES = {
    "storage: its image has no full version": _set("services", "storage", "image", to="rustfs/rustfs:latest"),
    "database: its image has no full version": _set("services", "database", "image", to="postgres:15"),
    "proxy: no healthcheck": _set("services", "proxy", "healthcheck", to={}),
    "server: does not come back after a reboot": _set("services", "server", "restart", to="always-not"),
    "server: may gain privileges": _set("services", "server", "security_opt", to=[]),
    "server: has the machine's rights": _set("services", "server", "network_mode", to="host"),
    "proxy: writes a log without end": _set("services", "proxy", "logging", to={}),
    "proxy: listens beyond this machine": _set("services", "proxy", "ports", to=["5000:8080"]),
    "database: has a secret in the file": _set(
        "services", "database", "environment", to={"POSTGRES_PASSWORD": "mlflow"}
    ),
    "storage: has a secret in the file": _set(
        "services", "storage", "environment", "RUSTFS_SECRET_KEY", to="${X:-admin}"
    ),
    "database: keeps its data outside of a volume": _set(
        "services", "database", "volumes", to=["database:/var/lib/data"]
    ),
    "server-local: keeps its data outside of a volume": _set("services", "server-local", "volumes", to=[]),
    "server: can reach docker": _set("services", "server", "volumes", to=["/var/run/docker.sock:/var/run/docker.sock"]),
    "volume spare: declared or used, not both": _set("volumes", "spare", to=None),
    "the inner network leads outside": _set("networks", "inside", to={}),
    "OTHER: not in .env.example": _set("services", "server", "environment", "X", to="${OTHER:-1}"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_compose_file_is_detected(compose_file: Compose, mistake: str) -> None:
    file = copy.deepcopy(compose_file)
    MISTAKES[mistake](file)
    assert mistake in compose_problems(file, EXAMPLE)


def test_unused_setting_is_detected(compose_file: Compose) -> None:
    assert compose_problems(compose_file, EXAMPLE | {"SPARE": "1"}) == ["SPARE: in .env.example, not used"]


def test_compose_file_fits_the_schema_of_compose(tmp_path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*check, DOCKER / "compose.yaml"], capture_output=True, check=False).returncode == 0
    wrong = (DOCKER / "compose.yaml").read_text().replace("healthcheck:", "healthchek:")
    (tmp_path / "compose.yaml").write_text(wrong)
    assert subprocess.run([*check, tmp_path / "compose.yaml"], capture_output=True, check=False).returncode == 1


PROFILES = {
    "full": {"database", "storage", "server", "proxy"},
    "s3": {"database", "server", "proxy"},
    "local": {"server-local", "proxy"},
    "full,pgadmin": {"database", "storage", "server", "proxy", "pgadmin"},
}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_starts_its_services(compose_file: Compose, profile: str) -> None:
    asked = set(profile.split(","))
    started = {name for name, service in compose_file["services"].items() if asked & set(service["profiles"])}
    assert started == PROFILES[profile]
    for name in started:
        for other, how in compose_file["services"][name].get("depends_on", {}).items():
            assert other in started or how.get("required") is False, (name, other)
    aliases = [compose_file["services"][name]["networks"] for name in started if name.startswith("server")]
    assert [networks["inside"]["aliases"] for networks in aliases] == [["mlflow"]]  # upstream of the proxy


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="not installed: docker compose",
)
@pytest.mark.parametrize("profile", PROFILES)
def test_docker_compose_resolves_the_same_config_as_the_tests(profile: str) -> None:
    command = ["docker", "compose", "--file", DOCKER / "compose.yaml", "--env-file", DOCKER / ".env.example", "config"]
    done = subprocess.run(command, env=os.environ | {"COMPOSE_PROFILES": profile}, capture_output=True, check=True)
    theirs = yaml.safe_load(done.stdout)["services"]
    ours = compose(EXAMPLE)["services"]
    assert set(theirs) == PROFILES[profile]
    for name, service in theirs.items():
        assert service.get("environment", {}) == ours[name].get("environment", {})
        assert service.get("command") == ours[name].get("command")


def test_local_profile_keeps_everything_in_its_volume() -> None:
    service = compose(EXAMPLE)["services"]["server-local"]
    (volume,) = service["volumes"]
    folder = volume.split(":")[1]
    assert service["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith(f"sqlite:///{folder}/")
    assert service["environment"]["MLFLOW_ARTIFACTS_DESTINATION"].startswith(f"{folder}/")


def instructions(text: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions with their arguments, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name.upper(), rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def dockerfile_problems(text: str) -> list[str]:
    """Return the problems of a Dockerfile by hadolint's rules and our own."""
    steps, stages, users, found = instructions(text), {}, {}, []
    defaults = dict(rest.split("=", 1) for name, rest in steps if name == "ARG" and "=" in rest)
    stage = ""
    for name, rest in steps:
        if name == "FROM":
            image, _, stage = rest.partition(" AS ")
            filled = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), image)
            stages[stage] = filled
            users[stage] = users.get(filled, "")
            if filled not in (*stages, "scratch") and not re.search(r":\d+\.\d+\.\d+|@sha256:", filled):
                found.append(f"{stage}: no full version: {filled}")
        if name == "USER":
            users[stage] = rest
        if name == "ADD" or (name == "RUN" and re.search(r"\b(curl|wget)\b", rest)):
            found.append(f"{stage}: fetches without a checksum: {rest}")
        if name in ("ARG", "ENV") and re.search("PASSWORD|TOKEN|SECRET|_KEY", rest, re.IGNORECASE):
            found.append(f"{stage}: a secret would stay in a layer: {rest}")
        if name == "COPY" and rest.split()[0] in (".", "./"):
            found.append(f"{stage}: copies everything")
        if name in ("ENTRYPOINT", "CMD") and not rest.startswith("["):
            found.append(f"{stage}: a shell would stand between docker and {rest}")
        if (
            name == "RUN"
            and "apt-get install" in rest
            and not ("--no-install-recommends" in rest and "apt/lists" in rest)
        ):
            found.append(f"{stage}: leaves what apt needs no more")
        if name == "RUN" and "pip install" in rest and "PIP_NO_CACHE_DIR=1" not in text:
            found.append(f"{stage}: leaves pip's cache")
    finals = (
        set(stages) - set(stages.values()) - {rest.split("=")[1].split()[0] for _, rest in steps if "--from=" in rest}
    )
    finals -= {one for one in finals if one.startswith("torch-") or stages[one] == "scratch"}
    return found + [f"{one}: runs as root" for one in finals | {"server"} if not re.match(r"[1-9]", users[one])]


DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def test_dockerfile_keeps_the_rules() -> None:
    assert dockerfile_problems(DOCKERFILE) == []
    assert {"server", "backup", "trainer", "torch-cpu", "torch-cuda"} <= set(re.findall(r" AS (\S+)", DOCKERFILE))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("3.11.15-slim-bookworm", "3.11", "base: no full version: python:3.11"),
        ("USER 1000:1000\nWORKDIR /work", "WORKDIR /work", "trainer: runs as root"),
        ("USER 1000:1000\nWORKDIR /\n", "WORKDIR /\n", "backup: runs as root"),
        ("COPY configs configs", "ADD https://example.org/x configs", "fetches without a checksum"),
        ("ARG TORCH_INDEX", "ARG INDEX_PASSWORD", "a secret would stay in a layer"),
        ("COPY configs configs", "COPY . .", "copies everything"),
        ('ENTRYPOINT ["prostate-seg"]', "ENTRYPOINT prostate-seg", "a shell would stand between"),
        (" --no-install-recommends", "", "leaves what apt needs no more"),
        ("PIP_NO_CACHE_DIR=1", "", "leaves pip's cache"),
    ],
)
def test_a_mistake_in_the_dockerfile_is_detected(old: str, new: str, problem: str) -> None:
    assert old in DOCKERFILE
    assert problem in " ".join(dockerfile_problems(DOCKERFILE.replace(old, new)))


def context() -> set[str]:
    """Return the files that Dockerfile.dockerignore admits to the build context."""
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    return {line[1:] for line in lines if line.startswith("!")}


def test_build_context_has_the_copied_files_and_no_private_ones() -> None:
    copied = [rest.split()[:-1] for name, rest in instructions(DOCKERFILE) if name == "COPY" and "--from" not in rest]
    assert {source for sources in copied for source in sources} == context()
    assert all((ROOT / name).exists() for name in context())
    assert not [name for name in context() if ".env" in name or name in ("data", "mlruns", ".git")]


@pytest.mark.slow
def test_trainer_is_built_from_the_files_in_its_context(tmp_path: Path) -> None:
    for name in context():
        there = tmp_path / "context" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, there)
    for folder in (ROOT, tmp_path / "context"):
        command = [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "--target",
            "wheel",
            "--directory",
            tmp_path / folder.name,
        ]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (ours,), (theirs,) = ((tmp_path / folder).glob("*.whl") for folder in (ROOT.name, "context"))
    names = [set(zipfile.ZipFile(wheel).namelist()) for wheel in (ours, theirs)]
    assert names[0] == names[1]
    assert "prostate_seg/configs/config.yaml" in names[1]


def test_server_image_gets_packages_that_the_lock_pins() -> None:
    lock = (ROOT / "requirements.lock").read_text().lower()
    (install,) = [rest for name, rest in instructions(DOCKERFILE) if name == "RUN" and "mlflow[auth]" in rest]
    for name in ("mlflow", "flask-wtf", "boto3", "psycopg2-binary"):
        assert f"\n{name}==" in lock
    assert 'pip install "mlflow[auth]" boto3 psycopg2-binary' in install
    version = re.search(r"^mlflow==(.*)$", lock, re.MULTILINE)
    assert version
    assert f"prostate-seg/mlflow:{version[1]}" in (DOCKER / "compose.yaml").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = [rest for name, rest in instructions(DOCKERFILE) if name == "RUN" and 'pip install ".[' in rest]
    assert set(re.findall(r"\w+", asked.split(".[")[1])) <= set(extras)


def test_settings_are_created_with_random_secrets_for_this_user_alone(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        stack_settings.make_settings(tmp_path / name, STACK_PORT="5001")
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        made.append(stack_settings.read_settings(tmp_path / name))
    secret = [name for name, value in EXAMPLE.items() if value.startswith("example-")]
    assert set(secret) == {name for name in EXAMPLE if name.endswith(("PASSWORD", "_KEY"))}
    for name in secret:
        assert len(made[0][name]) == 20
        assert made[0][name] != made[1][name]
    assert made[0]["STACK_PORT"] == "5001"
    assert list(made[0]) == list(EXAMPLE)
    with pytest.raises(FileExistsError):
        stack_settings.make_settings(tmp_path / "one")


def test_make_stack_refuses_passwords_of_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stack_settings, "SETTINGS", tmp_path / ".env")
    shutil.copy(DOCKER / ".env.example", tmp_path / ".env")
    with pytest.raises(SystemExit, match="still as in the example: MLFLOW_ADMIN_PASSWORD, MLFLOW_SECRET_KEY"):
        stack_settings.main()
    (tmp_path / ".env").unlink()
    stack_settings.main()
    stack_settings.main()
    assert "random passwords" in capsys.readouterr().out


def test_git_ignores_the_settings_and_the_backups() -> None:
    asked = ["docker/.env", "docker/backups/x/database.dump"]
    done = subprocess.run(["git", "check-ignore", *asked], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 128:
        pytest.skip("no git repository")
    assert done.stdout.split() == asked
