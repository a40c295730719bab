"""Checks of what a run needs from this machine: Python, packages, folders, git, DVC, the workspace and the environment.

The tracking store is checked in tracking/store/health.py. stage=doctor logs the results.
"""

import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import requires
from pathlib import Path
from typing import Self

from prostate_seg.common.address import project_root, resolved_uri, sqlite_file
from prostate_seg.common.errors import InputError, first_line
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.ds_version import read_entries
from prostate_seg.provenance.environment import git_state, packages
from prostate_seg.provenance.source_files import PACKAGE

LEAST_FREE_GIB = 1.0
"""Below this a run is likely to end in the middle of a write."""
LITTLE_FREE_GIB = 10.0
"""Below this a larger data set does not fit."""


class Severity(Enum):
    """Meaning of a check's result, as it is printed."""

    good = "ok"
    note = "note"
    """Runs work; the user should read it."""
    bad = "BAD"
    """Runs fail, or their records cannot be trusted."""


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check."""

    name: str
    text: str
    severity: Severity = Severity.good
    fix: str = ""

    @classmethod
    def note(cls, name: str, text: str, *, fix: str = "") -> Self:
        """Return a check with a remark."""
        return cls(name, text, Severity.note, fix)

    @classmethod
    def bad(cls, name: str, text: str, *, fix: str) -> Self:
        """Return a failed check."""
        return cls(name, text, Severity.bad, fix)


def check_all(cfg: Config, workspace: Workspace) -> list[Check]:
    """Run all checks that need no tracking store."""
    store = sqlite_file(resolved_uri(cfg.mlflow.tracking_uri or ""))
    folders = {"workspace": workspace.root, "cache": workspace.cache, "journal": Path(cfg.paths.journal)}
    if store is not None:
        folders["store"] = store.parent
    return [
        Check("python", platform.python_version()),  # an older one than is supported does not get here
        check_packages(PACKAGE.parent / "requirements.lock", packages()),
        *(check_folder(name, folder) for name, folder in folders.items()),
        check_git(Path.cwd()),
        check_dvc(project_root()),
        check_record(workspace),
        check_leftovers(workspace),
        check_environment(cfg),
    ]


def check_packages(lock: Path, installed: dict[str, str]) -> Check:
    """Compare the installed packages with the lock file, which has those of extras and tools too.

    A local build such as +cu128 counts as the same version.
    """
    if not lock.is_file():
        return Check.note(
            "packages", f"{len(installed)} installed; there is no {lock.name} beside the package to compare with"
        )
    pins = re.findall(r"^([A-Za-z0-9_.\-]+)==(\S+)$", lock.read_text(encoding="utf-8"), re.MULTILINE)
    pinned = {name.lower().replace("_", "-"): version for name, version in pins}
    declared = [line for line in requires("prostate-seg") or () if "extra ==" not in line]
    required = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in declared}
    missing = sorted(required & pinned.keys() - installed.keys())
    if missing:
        return Check.bad("packages", f"missing: {', '.join(missing)}", fix="make setup")
    present = {name: version for name, version in pinned.items() if name in installed}
    other = [
        f"{name} {installed[name]}, not {version}"
        for name, version in present.items()
        if installed[name].split("+")[0] != version.split("+")[0]
    ]
    if other:
        fix = "make setup, if numbers must be those of the lock"
        return Check.note("packages", f"not as locked: {', '.join(other)}", fix=fix)
    num_absent = len(pinned) - len(present)
    absent = f", {num_absent} of extras and tools are not installed" if num_absent else ""
    return Check("packages", f"{len(present)} as locked{absent}")


def check_folder(name: str, folder: Path) -> Check:
    """Check that a folder, or the nearest one above that exists, can be written and has room."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        fix = f"chmod u+w {there}, or choose another folder"
        return Check.bad(name, f"{there} cannot be written: {error.strerror}", fix=fix)
    free_gib = shutil.disk_usage(there).free / 2**30
    text = f"{there}, {free_gib:.0f} GiB free"
    if free_gib < LEAST_FREE_GIB:
        return Check.bad(name, text, fix="free some space, or set paths.root and paths.cache elsewhere")
    if free_gib < LITTLE_FREE_GIB:
        return Check.note(name, text, fix="free some space before a larger data set")
    return Check(name, text)


def check_git(folder: Path) -> Check:
    """Check that a run can be traced to a commit."""
    if shutil.which("git") is None:
        return Check.note("git", "is not installed: runs record no commit", fix="install git")
    state = git_state(folder)
    if state.problem:
        advice = [line for line in state.problem.splitlines()[1:] if line.startswith("git config")]
        return Check.bad(
            "git",
            f"runs record no commit or no diff, because git refuses: {first_line(state.problem)}",
            fix=advice[0] if advice else f"git -C {folder} fsck",
        )
    if not state.commit:
        fix = "git add . && git commit" if state.branch else "git init && git add . && git commit"
        return Check.note("git", "no commit here: runs cannot record the code that they ran", fix=fix)
    where = f"{state.commit[:8]} on {state.branch}"
    if state.is_dirty:
        fix = "git commit, before a run that counts"
        return Check.note("git", f"{where}, with changes that are not committed", fix=fix)
    return Check("git", where)


def check_dvc(root: Path) -> Check:
    """Check that data and results are under version control."""
    if not (root / ".dvc").is_dir():
        text = f"{root} is not a DVC project: data have hashes in the runs, but no versions"
        return Check.note("dvc", text, fix="dvc init")
    return Check("dvc", "dvc.lock holds the last results" if (root / "dvc.lock").is_file() else "no dvc.lock yet")


def check_record(workspace: Workspace) -> Check:
    """Check that DS_VERSION.json can be read."""
    file = workspace.ds_version_json
    try:
        entries = read_entries(workspace)
    except InputError as error:
        return Check.bad("record", first_line(error), fix=f"mv {file} {file}.broken")
    return Check("record", f"{file.name} records {', '.join(entries) or 'no stage yet'}")


def check_leftovers(workspace: Workspace) -> Check:
    """Check for temporary files of killed processes."""
    folders = (workspace.root, workspace.model, workspace.kfold_json.parent)
    found = [path for folder in folders for pattern in (".tmp-*", ".old-*") for path in folder.glob(pattern)]
    if not found:
        return Check("leftovers", "none")
    listing = " ".join(str(path) for path in found[:5]) + (" ..." if len(found) > 5 else "")
    return Check.note("leftovers", f"{len(found)} of killed runs", fix=f"when nothing runs: rm -r {listing}")


def check_environment(cfg: Config) -> Check:
    """Check for environment variables of MLflow that stages ignore."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named and cfg.mlflow.tracking_uri != named:
        text = "MLFLOW_TRACKING_URI is set, and not used without mlflow=server"
        return Check.note("environment", text, fix="mlflow=server")
    if os.environ.get("MLFLOW_RUN_ID"):
        text = "MLFLOW_RUN_ID is set; stages ignore it and open their own runs"
        return Check.note("environment", text, fix="unset MLFLOW_RUN_ID")
    return Check("environment", "nothing in the way")
