"""Which earlier runs a result rests on: the stages whose outputs it read, and all that those rest on in turn."""

from collections.abc import Iterable, Mapping
from typing import Any

from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.provenance.record import path_of


def ancestors(
    inputs: Iterable[str], entries: Mapping[str, Mapping[str, Any]], *, workspace: Workspace
) -> dict[str, dict[str, Any]]:
    """Return, by stage, the run that made what was read and whether that is still as the run left it.

    Args:
        inputs: Keys of what a stage has read.
        entries: The entries of DS_VERSION.json from before.
        workspace: Where the files lie.

    Returns:
        `{"preprocess": {"run_id": ..., "unchanged": True}, ...}`; a stage further back counts as unchanged only when
        everything between has stayed as it was.
    """
    found: dict[str, dict[str, Any]] = {}
    for stage, entry in entries.items():
        touched = [key for key in entry["outputs"] if any(_overlap(key, read) for read in inputs)]
        if not touched:
            continue
        unchanged = _hashes_now(touched, workspace) == {key: entry["outputs"][key] for key in touched}
        for name, run in entry["upstream"].items():
            found.setdefault(name, {"run_id": run["run_id"], "unchanged": run["unchanged"] and unchanged})
        found[stage] = {"run_id": entry["run_id"], "unchanged": unchanged}
    return found


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def _hashes_now(keys: Iterable[str], workspace: Workspace) -> dict[str, str]:
    there = {key: path_of(key, workspace) for key in keys if path_of(key, workspace).exists()}
    hashed = hash_paths(there.values(), cache=workspace.cache)
    return {key: hashed[path].md5 for key, path in there.items()}
