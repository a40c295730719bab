"""What a run was made with: git, packages, machine. Every question is asked once, and none of them needs torch."""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from prostate_seg.provenance.git import GitError, git, repository_above

LONGEST_DIFF = 500_000
"""Characters of `git diff` that are kept; a longer one is cut, and says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GitState:
    """The state of the repository that a run started in; what is not known is empty or None."""

    commit: str = ""
    branch: str = ""
    remote: str = ""
    is_dirty: bool | None = None
    """Whether tracked files differ from the commit, or there are untracked ones that git does not ignore."""
    diff: str = ""
    """Changes of tracked files against the commit, cut at LONGEST_DIFF."""
    untracked: tuple[str, ...] = ()
    """Files that git neither tracks nor ignores; at most 200 names."""
    problem: str = ""
    """Why git does not say more about a repository that is there, in its own words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a run finds around it."""

    git: GitState
    packages: dict[str, str]
    machine: dict[str, str]
    launched_by: dict[str, str]
    """Who started it, as far as the environment says: a DVC experiment, a Slurm job."""


LAUNCHERS = {
    "DVC_EXP_NAME": "dvc.experiment",
    "DVC_EXP_BASELINE_REV": "dvc.baseline",
    "DVC_STAGE": "dvc.stage",
    "SLURM_JOB_ID": "slurm.job_id",
    "SLURM_ARRAY_TASK_ID": "slurm.array_task_id",
}
"""Environment variables that are recorded, and the tags they become; no other variable ever is."""


def look_around(folder: Path) -> Surroundings:
    """Ask git, the package manager, the machine and the environment, once."""
    return Surroundings(
        git=git_state(folder),
        packages=packages(),
        machine=machine(),
        launched_by={tag: os.environ[name] for name, tag in LAUNCHERS.items() if os.environ.get(name)},
    )


def git_state(folder: Path) -> GitState:
    """Ask git about the repository around `folder`."""
    try:
        status = git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=normal")
    except GitError as error:
        return GitState(problem=str(error) if repository_above(folder) else "")
    lines = status.splitlines()
    heads = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# ") and " " in line[2:])
    commit = heads.get("branch.oid", "")
    changes = [line for line in lines if not line.startswith("#")]
    has_commit = commit not in ("", "(initial)")
    tracked_changes = [line for line in changes if not line.startswith("?")]
    diff, problem = _diff(folder) if has_commit and tracked_changes else ("", "")
    return GitState(
        commit=commit if has_commit else "",
        branch=heads.get("branch.head", ""),
        remote=_remote(folder),
        is_dirty=bool(changes) if has_commit else None,  # without a commit there is nothing to differ from
        diff=diff,
        untracked=tuple(line[2:] for line in changes if line.startswith("?"))[:200],
        problem=problem,
    )


def _diff(folder: Path) -> tuple[str, str]:
    """Return the changes since the commit in the form that `git apply` takes, or why there are none."""
    form = [f"diff.{name}=false" for name in ("noprefix", "mnemonicPrefix", "relative")]  # whatever this user prefers
    options = [word for setting in form for word in ("-c", setting)]
    try:
        return _capped(git(folder, *options, "diff", "HEAD", "--no-ext-diff", "--no-color")), ""
    except GitError as error:
        return "", str(error)


def _remote(folder: Path) -> str:
    try:
        return git(folder, "config", "--get", "remote.origin.url").strip()
    except GitError:  # there is none
        return ""


def packages() -> dict[str, str]:
    """Return the version of every installed package by its normalised name."""
    return dict(_installed())


@cache
def _installed() -> list[tuple[str, str]]:
    """Return names and versions, sorted; looked up once by a process, because every trial of a sweep asks."""
    found = ((dist.metadata["Name"], dist.version) for dist in importlib.metadata.distributions())
    return sorted((name.lower().replace("_", "-"), version) for name, version in found if name)


def machine() -> dict[str, str]:
    """Return host, operating system, Python, processor, memory, and GPU with its driver where there is one."""
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "num_cores": str(
            len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
        ),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        **_gpu(),
    }


def _gpu() -> dict[str, str]:
    """Ask the driver's own tool, which is there wherever the driver is."""
    if shutil.which("nvidia-smi") is None:
        return {"gpu": "none"}
    rows = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if not rows:
        return {"gpu": "none"}
    names, drivers = zip(*(row.rsplit(", ", 1) for row in rows.strip().splitlines()), strict=True)
    return {
        "gpu": ", ".join(names),
        "gpu_driver": drivers[0],
        "gpu_visible": os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _capped(diff: str) -> str:
    if len(diff) <= LONGEST_DIFF:
        return diff
    return diff[:LONGEST_DIFF] + f"\n# cut: {len(diff) - LONGEST_DIFF} more characters\n"
