"""What a run needs from this machine, checked one thing at a time. The tracking store has its checks in store_health."""

import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from prostate_seg.common.address import project_root, resolved_uri, sqlite_file
from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.ds_version import file_of, read_entries
from prostate_seg.provenance.environment import git_state, packages
from prostate_seg.provenance.source_files import PACKAGE
from prostate_seg.tracking.journal import waiting

LEAST_FREE_GIB = 1.0
"""Below this a run is likely to end in the middle of a write."""
LITTLE_FREE_GIB = 10.0
"""Below this a larger data set does not fit."""
OLDEST_PYTHON = (3, 11)


class Severity(Enum):
    """What a finding means."""

    good = "good"
    note = "note"
    """Runs go on; a person should know."""
    bad = "bad"
    """Runs fail, or their records cannot be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor."""

    name: str
    severity: Severity
    text: str
    fix: str = ""


def check_all(cfg: Config, workspace: Workspace) -> list[Finding]:
    """Check everything but the tracking store."""
    return [
        check_python(),
        check_packages(PACKAGE.parent / "requirements.lock", packages()),
        *check_folders(_folders(cfg, workspace)),
        check_git(Path.cwd()),
        check_dvc(project_root()),
        check_record(workspace),
        check_leftovers(workspace),
        check_spool(Path(cfg.paths.spool)),
        check_environment(cfg),
    ]


def check_python() -> Finding:
    """Compare the interpreter with the oldest that is supported."""
    version = platform.python_version()
    if tuple(map(int, platform.python_version_tuple()[:2])) < OLDEST_PYTHON:
        return _bad("python", version, "install Python 3.11 and run make setup")
    return _good("python", version)


def check_packages(lock: Path, installed: dict[str, str]) -> Finding:
    """Compare what is installed with the lock; a build such as +cu128 of the same version counts as the same."""
    if not lock.is_file():
        return _note(
            "packages", f"{len(installed)} installed; there is no {lock.name} beside the package to compare with", ""
        )
    pins = re.findall(r"^([A-Za-z0-9_.\-]+)==(\S+)$", lock.read_text(encoding="utf-8"), re.MULTILINE)
    pinned = {name.lower().replace("_", "-"): version for name, version in pins}
    missing = [name for name in pinned if name not in installed]
    other = [
        f"{name} {installed[name]}, not {version}"
        for name, version in pinned.items()
        if name in installed and installed[name].split("+")[0] != version.split("+")[0]
    ]
    if missing:
        return _bad("packages", f"missing: {', '.join(missing)}", "make setup")
    if other:
        return _note(
            "packages", f"not as locked: {', '.join(other)}", "make setup, if numbers must be those of the lock"
        )
    return _good("packages", f"all {len(pinned)} as locked")


def check_folders(folders: dict[str, Path]) -> list[Finding]:
    """Check that each folder can be written and has room."""
    return [_check_folder(name, folder) for name, folder in folders.items()]


def check_git(folder: Path) -> Finding:
    """Check that a run can be traced to a commit."""
    if shutil.which("git") is None:
        return _note("git", "is not installed: runs record no commit", "install git")
    state = git_state(folder)
    if state.problem:
        first, *more = state.problem.splitlines()
        advice = next((line for line in more if line.startswith("git config")), f"git -C {folder} fsck")
        return _bad("git", f"runs record no commit or no diff, because git refuses: {first}", advice)
    if not state.commit:
        advice = "git add . && git commit" if state.branch else "git init && git add . && git commit"
        return _note("git", "no commit here: runs cannot say which code they ran", advice)
    where = f"{state.commit[:8]} on {state.branch}"
    if state.is_dirty:
        return _note("git", f"{where}, with changes that are not committed", "git commit, before a run that counts")
    return _good("git", where)


def check_dvc(root: Path) -> Finding:
    """Check that data and results are under version control."""
    if not (root / ".dvc").is_dir():
        return _note("dvc", f"{root} is not a DVC project: data have hashes in the runs, but no versions", "dvc init")
    lock = root / "dvc.lock"
    return _good("dvc", "dvc.lock holds the last results" if lock.is_file() else "no dvc.lock yet")


def check_record(workspace: Workspace) -> Finding:
    """Check that DS_VERSION.json can be read."""
    try:
        entries = read_entries(workspace)
    except InputError as error:
        return _bad("record", str(error).splitlines()[0], f"mv {file_of(workspace)} {file_of(workspace)}.broken")
    return _good("record", f"{file_of(workspace).name} knows {', '.join(entries) or 'no stage yet'}")


def check_leftovers(workspace: Workspace) -> Finding:
    """Look for what a killed write has left."""
    places = (workspace.root, workspace.model, workspace.preprocess.parent / "prepared")
    found = [path for place in places for pattern in (".tmp-*", ".old-*") for path in place.glob(pattern)]
    if not found:
        return _good("leftovers", "none")
    listing = " ".join(str(path) for path in found[:5]) + (" ..." if len(found) > 5 else "")
    return _note("leftovers", f"{len(found)} of killed runs", f"when nothing runs: rm -r {listing}")


def check_spool(folder: Path) -> Finding:
    """Look for what a store has still to be told."""
    found = [one for one in waiting(folder) if not one.is_held]
    if not found:
        return _good("spool", f"nothing waits in {folder}")
    addresses = ", ".join(sorted({one.address for one in found}))
    return _note("spool", f"{len(found)} runs wait in {folder} to be sent to {addresses}", "stage=sync")


def check_environment(cfg: Config) -> Finding:
    """Look for variables that do something else than their owner may think."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named and cfg.mlflow.tracking_uri != named:
        return _note("environment", "MLFLOW_TRACKING_URI is set, and not used without mlflow=server", "mlflow=server")
    if os.environ.get("MLFLOW_RUN_ID"):
        return _note(
            "environment", "MLFLOW_RUN_ID is set; stages ignore it and open their own runs", "unset MLFLOW_RUN_ID"
        )
    return _good("environment", "nothing in the way")


def _folders(cfg: Config, workspace: Workspace) -> dict[str, Path]:
    file = sqlite_file(resolved_uri(cfg.mlflow.tracking_uri or ""))
    return {
        "workspace": workspace.root,
        "cache": workspace.cache,
        "spool": Path(cfg.paths.spool),
        **({"store": file.parent} if file else {}),
    }


def _check_folder(name: str, folder: Path) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return _bad(
            name, f"{there} cannot be written: {error.strerror}", f"chmod u+w {there}, or choose another folder"
        )
    free_gib = shutil.disk_usage(there).free / 2**30
    text = f"{there}, {free_gib:.0f} GiB free"
    if free_gib < LEAST_FREE_GIB:
        return _bad(name, text, "free some space, or set paths.root and paths.cache elsewhere")
    if free_gib < LITTLE_FREE_GIB:
        return _note(name, text, "free some space before a larger data set")
    return _good(name, text)


def _good(name: str, text: str) -> Finding:
    return Finding(name=name, severity=Severity.good, text=text)


def _note(name: str, text: str, fix: str) -> Finding:
    return Finding(name=name, severity=Severity.note, text=text, fix=fix)


def _bad(name: str, text: str, fix: str) -> Finding:
    return Finding(name=name, severity=Severity.bad, text=text, fix=fix)
