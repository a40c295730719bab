"""Guard against archive members that would be written outside of their folder ("zip slip")."""

import re
from pathlib import PurePosixPath


def is_inside(name: str) -> bool:
    """Return whether a member's name is a relative path that stays below the folder it is unpacked to, on any system."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not (path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name))
