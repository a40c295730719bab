"""Addresses of tracking stores, runs and registered models. Nothing here connects to one."""

import os
import re
from pathlib import Path

DRIVE = r"[A-Za-z]:[/\\]"
"""Start of an absolute path on Windows."""
REGISTRY = "models:/"
"""Prefix of the address of a registered model."""
RUN_ID = re.compile("[0-9a-f]{32}")
"""Id of a run in MLflow."""


def resolved_uri(uri: str) -> str:
    """Return the URI with a relative sqlite file resolved against the project's root."""
    match = re.match(rf"sqlite:///(?!/|{DRIVE})(.+)$", uri)
    return f"sqlite:///{(project_root() / match.group(1)).as_posix()}" if match else uri


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a resolved sqlite URI, None for every other."""
    match = re.match(rf"sqlite:///((?:/|{DRIVE})[^?]*)", uri)
    return Path(match.group(1)) if match else None


def project_root() -> Path:
    """Return the project's root: DVC's, also from inside its temporary workspaces; git's; or the current folder."""
    if os.environ.get("DVC_ROOT"):
        return Path(os.environ["DVC_ROOT"]).absolute()
    here = Path.cwd()
    around = (folder for folder in (here, *here.parents) if (folder / ".git").exists() or (folder / ".dvc").is_dir())
    return next(around, here)


def shown_address(uri: str) -> str:
    """Return a URI without user, password and query."""
    return re.sub(r"\?.*$", "", re.sub(r"(://)[^/@]*@", r"\1", uri))
