"""DS_VERSION.json: the newest finished run of each stage in a workspace, readable without a server.

A writer holds a lock, changes one entry and replaces the file as a whole. A process that is killed leaves the old file or the
new one, never a part of either.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from filelock import FileLock

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_json, write_text
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace

FORMAT = 1
LOCK = "ds_version.lock"

LOCAL_ID = re.compile(r"\blocal-[0-9a-f]{32}\b")
"""Id of a run before the tracking store assigns one."""


def entry_name(cfg: Config) -> str:
    """Return the name of a stage's entry; a fold trained alone has one of its own, such as train.fold0."""
    is_single_fold = cfg.stage == "train" and cfg.fold.index is not None
    return f"{cfg.stage}.fold{cfg.fold.index}" if is_single_fold else str(cfg.stage)


def recording_workspace(cfg: Config, workspace: Workspace) -> Workspace:
    """Return the workspace whose file records a stage: for train the one that holds the networks (paths.trained)."""
    return replace(workspace, root=workspace.model.parent) if cfg.stage == "train" else workspace


def read_entries(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Return the entries by name; empty if there is no file yet.

    Raises:
        InputError: If the file was not written by this module.
    """
    path = workspace.ds_version_json
    if not path.is_file():
        return {}
    try:
        entries: dict[str, dict[str, Any]] = read_json(path)["stages"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); it is written by stages only\n"
            "Move it away; the next run of each stage writes its entry again."
        ) from error
    return entries


def known_entries(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Return the entries of the workspace and of the folder of the networks (paths.trained)."""
    return read_entries(workspace) | read_entries(replace(workspace, root=workspace.model.parent))


def write_entry(workspace: Workspace, name: str, entry: dict[str, Any]) -> None:
    """Replace the entry of a stage or of a fold; the entry of a whole stage replaces those of its folds."""
    workspace.cache.mkdir(parents=True, exist_ok=True)
    with FileLock(workspace.cache / LOCK, timeout=60):
        others = {key: old for key, old in read_entries(workspace).items() if not key.startswith(f"{name}.")}
        stages = dict(sorted((others | {name: entry}).items()))
        write_json(workspace.ds_version_json, {"format": FORMAT, "stages": stages})


def replace_ids(workspace: Workspace, ids: Mapping[str, str]) -> None:
    """Replace local ids of runs by the ids that the tracking store has assigned since."""
    path = workspace.ds_version_json
    if not path.is_file() or not workspace.cache.is_dir():
        return
    with FileLock(workspace.cache / LOCK, timeout=60):
        text = path.read_text(encoding="utf-8")
        replaced = LOCAL_ID.sub(lambda found: ids.get(found[0], found[0]), text)
        if replaced != text:
            write_text(path, replaced)
