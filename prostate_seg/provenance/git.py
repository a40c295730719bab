"""The only module that starts git. What git refuses is raised with its own message."""

import os
import subprocess
from pathlib import Path

from prostate_seg.common.errors import InputError

TIMEOUT_SECONDS = 120.0
"""The status of a large repository on a network drive takes up to this long."""
FAILURE = 128
"""Exit code of git for all that it refuses; also that of a GitError if git is not installed."""


class GitError(InputError):
    """git is not installed, does not answer, or refuses a command."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code
        """Exit code of git: 1 for a negative answer, such as an unknown revision; 128 for a failure."""


def git(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    """Run git in a folder and return its output.

    Raises:
        GitError: If git is not installed, does not answer, or exits with another code than 0.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},  # one language in all records
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise GitError(f"git {arguments[0]} has not answered within {TIMEOUT_SECONDS:.0f} s", FAILURE) from error
    except OSError as error:
        raise GitError("git is not installed, or not on the PATH", FAILURE) from error
    if done.returncode != 0:
        message = "\n".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise GitError(message or f"git {arguments[0]} exited with code {done.returncode}", done.returncode)
    return done.stdout


def git_succeeds(folder: Path, *arguments: str, stdin: str | None = None) -> bool:
    """Run git in a folder and return whether it exits with code 0."""
    try:
        git(folder, *arguments, stdin=stdin)
    except GitError:
        return False
    return True


def repository_above(folder: Path) -> Path | None:
    """Return the nearest folder with a .git, whether or not git accepts it as a repository."""
    here = folder.absolute()
    return next((path for path in (here, *here.parents) if os.path.lexists(path / ".git")), None)
