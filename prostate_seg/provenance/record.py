"""Provenance record of a finished stage: provenance.json of its run, and its entry of DS_VERSION.json.

Paths in it are relative to the workspace. The key `data` is the folder of images and masks, wherever that is; other paths
outside of the workspace are absolute. The lineage of a result are the runs whose outputs it read, and those upstream of them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.hashing import Hashed, hash_paths

DATA = "data"


def hashes_by_key(paths: Iterable[Path], *, workspace: Workspace) -> dict[str, Hashed]:
    """Return the hashes of files and folders that a stage read or wrote, by their keys in records."""
    hashed = hash_paths(paths, cache=workspace.cache)
    return {key_of(path, workspace): one for path, one in hashed.items()}


def key_of(path: Path, workspace: Workspace) -> str:
    """Return the key of a path in records."""
    path = path.absolute().resolve()
    for folder, alias in ((workspace.data, DATA), (workspace.root, "")):
        folder = folder.absolute().resolve()
        if path.is_relative_to(folder):
            return (alias / path.relative_to(folder)).as_posix()
    return path.as_posix()


def path_of(key: str, workspace: Workspace) -> Path:
    """Return the path of a key in this workspace."""
    if key == DATA or key.startswith(f"{DATA}/"):
        return workspace.data / key.removeprefix(DATA).lstrip("/")
    return workspace.root / key  # an absolute key replaces the root


def ancestors(
    inputs: Iterable[str], entries: Mapping[str, Mapping[str, Any]], *, workspace: Workspace
) -> dict[str, dict[str, Any]]:
    """Return the upstream run of each stage, and whether its outputs are unchanged, given the keys that a stage has read.

    The entries are the others of DS_VERSION.json.

    Returns:
        `{"preprocess": {"run_id": ..., "unchanged": True}, ...}`; a stage further upstream counts as unchanged only if
        all stages between are.
    """
    inputs = list(inputs)
    found: dict[str, dict[str, Any]] = {}
    for stage, entry in entries.items():
        read = [
            key
            for key in entry["outputs"]
            if any(key == one or key.startswith(f"{one}/") or one.startswith(f"{key}/") for one in inputs)
        ]
        if not read:
            continue
        paths = {key: path_of(key, workspace) for key in read if path_of(key, workspace).exists()}
        hashed = hash_paths(paths.values(), cache=workspace.cache)
        unchanged = all(key in paths and hashed[paths[key]].md5 == entry["outputs"][key] for key in read)
        for name, run in entry["upstream"].items():
            found.setdefault(name, {"run_id": run["run_id"], "unchanged": run["unchanged"] and unchanged})
        found[stage] = {"run_id": entry["run_id"], "unchanged": unchanged}
    return found
