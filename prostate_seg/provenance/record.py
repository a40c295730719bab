"""The record of one finished stage: what it read, wrote and ran on. One shape, written twice.

It goes to the run as provenance.json and to the workspace as an entry of DS_VERSION.json. Paths are relative to the
workspace; `data` stands for the folder of images and masks, wherever that lies; others outside are absolute.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.hashing import Hashed, hash_paths
from prostate_seg.provenance.source_files import PACKAGE, source_files

DATA = "data"
"""The key of the folder with images/ and masks/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashes:
    """Everything a stage touched, by key."""

    inputs: Mapping[str, Hashed]
    outputs: Mapping[str, Hashed]
    code: Mapping[str, Hashed]


def hash_stage(stage: str, inputs: Iterable[Path], outputs: Iterable[Path], *, workspace: Workspace) -> Hashes:
    """Hash what a stage read and wrote, and the source files it is made of."""
    inputs, outputs, code = list(inputs), list(outputs), source_files(stage)
    hashed = hash_paths([*inputs, *outputs, *code], cache=workspace.cache)
    return Hashes(
        inputs={key_of(path, workspace): hashed[path] for path in inputs},
        outputs={key_of(path, workspace): hashed[path] for path in outputs},
        code={code_key(path): hashed[path] for path in code},
    )


def key_of(path: Path, workspace: Workspace) -> str:
    """Return the name under which a path is recorded."""
    path = path.absolute().resolve()
    for folder, alias in ((workspace.data, DATA), (workspace.root, "")):
        if path.is_relative_to(folder.absolute().resolve()):
            inside = path.relative_to(folder.absolute().resolve()).as_posix()
            return "/".join(part for part in (alias, inside) if part and part != ".") or "."
    return path.as_posix()


def path_of(key: str, workspace: Workspace) -> Path:
    """Return the path that a key stands for in this workspace."""
    if key == DATA or key.startswith(f"{DATA}/"):
        return workspace.data / key.removeprefix(DATA).lstrip("/")
    return workspace.root / key  # an absolute key replaces the root


def code_key(path: Path) -> str:
    """Return the name under which a file of the package is recorded."""
    return path.relative_to(PACKAGE.parent).as_posix()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as dotted keys with scalar values in text; lists as JSON."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return found
