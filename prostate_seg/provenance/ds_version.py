"""DS_VERSION.json: the newest finished run of each stage in this workspace, readable without any server.

A writer holds the lock, reads, changes one entry and lets a complete new file replace the old one. So a process killed at
any moment leaves the file from before or the file from after, and other stages' entries untouched.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_json, write_text
from prostate_seg.config.workspace import Workspace

FORMAT = 1
LOCK = "ds_version.lock"

LOCAL_ID = re.compile(r"\blocal-[0-9a-f]{32}\b")
"""Id of a run until a tracking store has given it one."""


def read_entries(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Return the entry of each stage by name; empty when there is no file yet.

    Raises:
        InputError: If the file is not what this module writes.
    """
    path = file_of(workspace)
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
        entries: dict[str, dict[str, Any]] = content["stages"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); it is written by stages only\n"
            "Move it away; the next run of each stage writes its entry again."
        ) from error
    return entries


def write_entry(workspace: Workspace, name: str, entry: dict[str, Any]) -> None:
    """Replace the entry of a stage, such as train, or of a fold trained alone, such as train.fold0.

    The entry of a whole stage takes the place of those of its folds.
    """
    workspace.cache.mkdir(parents=True, exist_ok=True)
    with FileLock(workspace.cache / LOCK, timeout=60):
        others = {key: old for key, old in read_entries(workspace).items() if not key.startswith(f"{name}.")}
        entries = others | {name: entry}
        write_json(file_of(workspace), {"format": FORMAT, "stages": dict(sorted(entries.items()))})


def replace_ids(workspace: Workspace, ids: Mapping[str, str]) -> None:
    """Put the store's ids of runs in place of those that they had before it was told of them."""
    path = file_of(workspace)
    if not path.is_file() or not workspace.cache.is_dir():
        return
    with FileLock(workspace.cache / LOCK, timeout=60):
        text = path.read_text(encoding="utf-8")
        known = LOCAL_ID.sub(lambda found: ids.get(found[0], found[0]), text)
        if known != text:
            write_text(path, known)


def file_of(workspace: Workspace) -> Path:
    """Return where the file lies."""
    return workspace.root / "DS_VERSION.json"
