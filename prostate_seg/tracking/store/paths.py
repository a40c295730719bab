"""Artifact paths of a sqlite tracking store: detects a store that was moved or copied, and replaces its paths.

MLflow stores absolute paths. The artifacts of a store are in mlruns/ beside its file. Nothing here imports MLflow.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_path

ARTIFACTS = "mlruns"
PATHS = (
    ("experiments", "artifact_location", "1"),
    ("runs", "artifact_uri", "1"),
    ("logged_models", "artifact_location", "1"),
    ("model_versions", "source", "1"),
    ("model_versions", "storage_location", "1"),
    ("trace_tags", "value", "key = 'mlflow.artifactLocation'"),
)
"""Tables and columns of MLflow with artifact paths, and the rows that hold one."""


def previous_folders(file: Path, *, experiment: str) -> list[Path]:
    """Return the folders from which a store was moved or copied; empty if its paths are right.

    Experiments whose artifacts were put elsewhere on purpose do not count: their artifacts exist there, and not here.
    """
    here = file.absolute().parent
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        try:
            rows = connection.execute("SELECT name, artifact_location FROM experiments").fetchall()
        except sqlite3.Error:  # MLflow reports what is wrong with the file
            return []
    found = set()
    for name, location in rows:
        path = local_path(location or "")
        if path is None or path.parent.name != ARTIFACTS or path.parents[1].resolve() == here.resolve():
            continue
        is_copied = (here / ARTIFACTS / path.name).exists()
        is_gone = name == experiment and not path.parents[1].exists()
        if is_copied or is_gone:
            found.add(path.parents[1])
    return sorted(found)


def require_own_paths(file: Path, *, experiment: str) -> None:
    """Refuse a store that was moved or copied: it would read and write artifacts in its former folder.

    Raises:
        InputError: With the command that replaces the paths.
    """
    for old in previous_folders(file, experiment=experiment):
        is_there = "is still there: this is a copy" if old.exists() else "is no longer there"
        raise InputError(
            f"{file} was moved or copied: it keeps artifacts in {old / ARTIFACTS}, and {old} {is_there}\n"
            f"Replace the paths in {file.name} by those of this folder (a backup is kept, {old} is not touched): "
            "stage=doctor doctor.fix_paths=true"
        )


def fix_paths(file: Path, *, experiment: str) -> str:
    """Replace former folders in all artifact paths by that of the store, after a backup; return what was done, for people.

    Raises:
        sqlite3.Error, OSError: If the file cannot be read or written; nothing is changed then.
    """
    former = previous_folders(file, experiment=experiment)
    if not former:
        return f"nothing to fix in {file}"
    here = file.absolute().parent
    backup = file.with_name(f"{file.name}.{datetime.now(UTC):%Y%m%dT%H%M%S}.backup")
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.create_function("moved", 1, partial(_moved, former=former, here=here), deterministic=True)
        connection.execute("BEGIN IMMEDIATE")  # no other process writes between the backup and the change
        with (
            atomic_path(backup) as temporary,
            closing(sqlite3.connect(file)) as source,
            closing(sqlite3.connect(temporary)) as target,
        ):
            source.backup(target)
        num_paths = sum(
            connection.execute(
                f"UPDATE {table} SET {column} = moved({column}) WHERE moved({column}) <> {column} AND {is_path}"
            ).rowcount
            for table, column, is_path in PATHS
        )
        connection.execute("COMMIT")
    old = ", ".join(map(str, former))
    return f"{num_paths} paths below {old} are now below {here}; {file.name} as it was: {backup}"


def _moved(location: str | None, *, former: Sequence[Path], here: Path) -> str | None:
    """Return a location below one of the former folders as the same place below `here`; every other as it is."""
    path = local_path(location or "")
    for folder in former:
        if path is not None and path.is_relative_to(folder):
            moved = here / path.relative_to(folder)
            return moved.as_uri() if str(location).startswith("file:") else str(moved)
    return location


def local_path(location: str) -> Path | None:
    """Return the path of a location on this machine; None for one in a bucket or on a server."""
    if location.startswith("file:"):
        return Path(unquote(urlsplit(location).path))
    return Path(location) if Path(location).is_absolute() else None
