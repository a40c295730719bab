"""Create docker/.env with random passwords, or check an existing one: the first step of `make stack`."""

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

DOCKER = Path(__file__).parents[1] / "docker"
EXAMPLE_SETTINGS = DOCKER / ".env.example"
SETTINGS = DOCKER / ".env"
EXAMPLE = "example-"
"""Prefix of a secret that has not been set."""


def main() -> None:
    """Create or check the settings."""
    if not SETTINGS.exists():
        make_settings(SETTINGS)
        print(f"created {SETTINGS} with random passwords; the administrator's is MLFLOW_ADMIN_PASSWORD there")
        return
    left = example_secrets(read_settings(SETTINGS))
    if left:
        sys.exit(
            f"{SETTINGS}: still as in the example: {', '.join(left)}\n"
            "The stack does not start with example passwords. Set them, or remove the file to create a new one."
        )


def make_settings(target: Path, **chosen: str) -> None:
    """Write the example's settings with random secrets, readable by this user only.

    Args:
        target: The new file.
        chosen: Values that replace those of the example.

    Raises:
        FileExistsError: If the file exists.
    """
    lines = []
    for line in EXAMPLE_SETTINGS.read_text().splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            random = secrets.token_urlsafe(15) if value.startswith(EXAMPLE) else value
            line = f"{name}={chosen.get(name, random)}"
        lines.append(line)
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write("\n".join(lines) + "\n")


def read_settings(path: Path) -> dict[str, str]:
    """Return the settings of a file of lines NAME=value."""
    lines = (line.strip() for line in path.read_text().splitlines())
    parts = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, _, value in parts}


def example_secrets(settings: dict[str, str]) -> list[str]:
    """Return the names of settings with the value of the example."""
    return [name for name, value in settings.items() if value.startswith(EXAMPLE)]


def login_to_use(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the server and its administrator from the environment, by default those of docker/.env."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    given = {name: environment[name] for name in names if environment.get(name)}
    if "MLFLOW_TRACKING_URI" not in given and SETTINGS.exists():
        return login_of(read_settings(SETTINGS))
    absent = [name for name in names if name not in given]
    if absent:
        sys.exit(f"set {', '.join(absent)}: the server, and an administrator of it")
    if "@" in given["MLFLOW_TRACKING_URI"]:
        sys.exit("give user and password by MLFLOW_TRACKING_USERNAME and _PASSWORD, not inside MLFLOW_TRACKING_URI")
    return given | {"MLFLOW_TRACKING_URI": given["MLFLOW_TRACKING_URI"].rstrip("/")}


def login_of(settings: dict[str, str]) -> dict[str, str]:
    """Return the environment variables with which MLflow's client logs in to the stack as its administrator."""
    address = settings["STACK_ADDRESS"] if settings["STACK_ADDRESS"] != "0.0.0.0" else "127.0.0.1"
    return {
        "MLFLOW_TRACKING_URI": f"http://{address}:{settings['STACK_PORT']}",
        "MLFLOW_TRACKING_USERNAME": settings["MLFLOW_ADMIN_USERNAME"],
        "MLFLOW_TRACKING_PASSWORD": settings["MLFLOW_ADMIN_PASSWORD"],
    }


if __name__ == "__main__":
    main()
