"""Lineage: the upstream runs of a result, which are the runs whose outputs it read and those upstream of them."""

from collections.abc import Iterable, Mapping
from typing import Any

from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.provenance.record import path_of


def ancestors(
    inputs: Iterable[str], entries: Mapping[str, Mapping[str, Any]], *, workspace: Workspace
) -> dict[str, dict[str, Any]]:
    """Return the upstream run of each stage, and whether its outputs are unchanged.

    Args:
        inputs: Keys of the paths that a stage has read.
        entries: The other entries of DS_VERSION.json.
        workspace: Folders of the files.

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
