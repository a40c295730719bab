"""Calls of git: the only place that starts it. What git refuses is raised in its own words."""

import os
import subprocess
from pathlib import Path

from prostate_seg.common.errors import InputError

SECONDS_TO_ANSWER = 120.0
"""A large repository on a network drive takes this long at most for its status."""
ABSENT = 128
"""Exit code of a GitError when git itself is missing; git uses it for everything that it refuses."""


class GitError(InputError):
    """git is not installed, or refused a command; the text is git's own."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code
        """git's exit code: 1 for an answer "no", such as an unknown revision, 128 for a failure."""


def git(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    """Return what git prints when it is run in a folder.

    Args:
        folder: Inside of the repository; relative paths of the arguments count from there.
        arguments: Of the command line.
        stdin: What git reads.

    Raises:
        GitError: If git is not installed, does not answer, or exits with another code than 0.
    """
    command = ["git", "-C", str(folder), *arguments]
    environment = {**os.environ, "LC_ALL": "C"}  # one language in all records
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=SECONDS_TO_ANSWER,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise GitError(f"git {arguments[0]} has not answered within {SECONDS_TO_ANSWER:.0f} s", ABSENT) from error
    except OSError as error:
        raise GitError("git is not installed, or not on the PATH", ABSENT) from error
    if done.returncode != 0:
        words = "\n".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise GitError(words or f"git {arguments[0]} exited with code {done.returncode}", done.returncode)
    return done.stdout


def repository_above(folder: Path) -> Path | None:
    """Return the nearest folder with a .git, whether or not git takes it for a repository."""
    here = folder.absolute()
    return next((path for path in (here, *here.parents) if os.path.lexists(path / ".git")), None)
