"""Environment of a run: state of the git repository, installed packages, machine and launcher. No torch."""

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from functools import cache
from pathlib import Path

import psutil

from prostate_seg.common.progress import num_cores
from prostate_seg.provenance.git import GitError, git, repository_above

LONGEST_DIFF = 500_000
"""Characters of `git diff` that are recorded; a longer one is cut, with a note at its end."""
MAX_UNTRACKED = 200
"""Names of untracked files that are recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GitState:
    """State of a repository; an unknown value is empty or None."""

    commit: str = ""
    branch: str = ""
    remote: str = ""
    is_dirty: bool | None = None
    """Whether tracked files differ from the commit, or there are untracked files that git does not ignore."""
    diff: str = ""
    """Changes of tracked files since the commit, in the form that `git apply` reads; cut at LONGEST_DIFF."""
    untracked: tuple[str, ...] = ()
    """Files that git neither tracks nor ignores; at most MAX_UNTRACKED."""
    problem: str = ""
    """Message of git if it refuses an existing repository."""


LAUNCHERS = {
    "DVC_EXP_NAME": "dvc.experiment",
    "DVC_EXP_BASELINE_REV": "dvc.baseline",
    "DVC_STAGE": "dvc.stage",
    "SLURM_JOB_ID": "slurm.job_id",
    "SLURM_ARRAY_TASK_ID": "slurm.array_task_id",
}
"""Tags by the environment variables that they record; no other variable is recorded."""


def launcher_tags() -> dict[str, str]:
    """Return the tags of the DVC experiment or Slurm job that started this process."""
    return {tag: os.environ[name] for name, tag in LAUNCHERS.items() if os.environ.get(name)}


def git_state(folder: Path) -> GitState:
    """Return the state of the repository around a folder."""
    try:
        status = git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=normal")
    except GitError as error:
        return GitState(problem=str(error) if repository_above(folder) else "")
    lines = status.splitlines()
    headers = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# ") and " " in line[2:])
    changes = [line for line in lines if not line.startswith("#")]
    commit = headers.get("branch.oid", "").replace("(initial)", "")
    diff = problem = remote = ""
    if commit and any(not line.startswith("?") for line in changes):
        # a form that `git apply` reads, whatever the user's own settings are
        form = [word for name in ("noprefix", "mnemonicPrefix", "relative") for word in ("-c", f"diff.{name}=false")]
        try:
            diff = git(folder, *form, "diff", "HEAD", "--no-ext-diff", "--no-color")
        except GitError as error:
            problem = str(error)
    if len(diff) > LONGEST_DIFF:
        diff = diff[:LONGEST_DIFF] + f"\n# cut: {len(diff) - LONGEST_DIFF} more characters\n"
    with contextlib.suppress(GitError):  # there is no remote
        remote = git(folder, "config", "--get", "remote.origin.url").strip()
    return GitState(
        commit=commit,
        branch=headers.get("branch.head", ""),
        remote=remote,
        is_dirty=bool(changes) if commit else None,
        diff=diff,
        untracked=tuple(line[2:] for line in changes if line.startswith("?"))[:MAX_UNTRACKED],
        problem=problem,
    )


@cache  # every trial of a sweep records the same
def packages() -> dict[str, str]:
    """Return the version of every installed package by its normalised name, sorted."""
    headers = map(_metadata_header, importlib.metadata.distributions())
    found = ((header["Name"], header["Version"]) for header in headers)
    return dict(sorted((name.lower().replace("_", "-"), version) for name, version in found if name))


def _metadata_header(distribution: importlib.metadata.Distribution) -> Message:
    """Return the metadata of a package without its description, which takes most of the time to parse."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return HeaderParser().parsestr(text.partition("\n\n")[0])


def machine() -> dict[str, str]:
    """Return host, operating system, Python, processor, memory, and GPUs with their driver."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu_lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu_names = (line.split(":", 1)[1].strip() for line in cpu_lines if line.startswith("model name"))
    found = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": next(cpu_names, platform.processor() or platform.machine()),
        "num_cores": str(num_cores()),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "gpu": "none",
    }
    if rows := _gpu_rows():
        names, drivers = zip(*(row.rsplit(", ", 1) for row in rows), strict=True)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        found |= {"gpu": ", ".join(names), "gpu_driver": drivers[0], "gpu_visible": visible}
    return found


def _gpu_rows() -> list[str]:
    """Return a row `name, driver` per GPU from nvidia-smi, which comes with the driver; none where that is absent or fails."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()
