"""Where a sqlite store's artifacts lie: MLflow keeps absolute paths, which a project folder that is moved or copied outgrows.

A store keeps its artifacts in mlruns/ beside its file. Nothing here needs MLflow.
"""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_path

ARTIFACTS = "mlruns"
PATHS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
    "trace_tags": ("value",),
}
"""Columns of MLflow's tables that hold places of artifacts; a trace has its place in the tag mlflow.artifactLocation."""
ONLY = {"trace_tags": "key = 'mlflow.artifactLocation'"}
"""Rows to which a table is limited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """What was replaced in a store."""

    old: list[Path]
    num_paths: int
    backup: Path


def previous_folders(file: Path, *, experiment: str) -> list[Path]:
    """Return the folders that a store was moved or copied from; none when it is where its paths say.

    An experiment whose artifacts were put elsewhere on purpose does not count: they are there, and not here.
    """
    here = file.absolute().parent
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        try:
            rows = connection.execute("SELECT name, artifact_location FROM experiments").fetchall()
        except sqlite3.Error:  # MLflow says what is wrong with the file
            return []
    places = [(name, place) for name, location in rows if location and (place := local_path(location)) is not None]
    left = {place.parents[1] for name, place in places if _is_left_behind(place, here, is_used=name == experiment)}
    return sorted(left)


def _is_left_behind(place: Path, here: Path, *, is_used: bool) -> bool:
    """Return whether an experiment's folder is that of another store: this folder has a copy of it, or it is gone."""
    if place.parent.name != ARTIFACTS or place.parents[1].resolve() == here.resolve():
        return False
    return (here / ARTIFACTS / place.name).exists() or (is_used and not place.parents[1].exists())


def require_own_paths(file: Path, *, experiment: str) -> None:
    """Refuse a store whose artifacts would be written to, and read from, the folder that it was moved or copied from.

    Raises:
        InputError: If it was, with the command that replaces the paths.
    """
    for old in previous_folders(file, experiment=experiment):
        is_there = "is still there: this is a copy" if old.exists() else "is no longer there"
        raise InputError(
            f"{file} was moved or copied: it keeps artifacts in {old / ARTIFACTS}, and {old} {is_there}\n"
            f"Replace the paths in {file.name} by those of this folder (a backup is kept, {old} is not touched): "
            "stage=doctor doctor.fix_paths=true"
        )


def fix_paths(file: Path, *, experiment: str) -> Fixed | None:
    """Let all places of artifacts lie below the folder of the store, in one transaction, after a backup.

    Returns:
        What was replaced; None if nothing had to be.

    Raises:
        sqlite3.Error, OSError: If the file cannot be read or written; nothing is changed then.
    """
    left = previous_folders(file, experiment=experiment)
    if not left:
        return None
    new = file.absolute().parent
    backup = file.with_name(f"{file.name}.{datetime.now(UTC):%Y%m%dT%H%M%S}.backup")

    def moved(value: str | None) -> str | None:
        place = None if value is None else local_path(value)
        old = next((folder for folder in left if place is not None and place.is_relative_to(folder)), None)
        if value is None or place is None or old is None:
            return value
        there = new / place.relative_to(old)
        return there.as_uri() if value.startswith("file:") else str(there)

    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.create_function("moved", 1, moved, deterministic=True)
        connection.execute("BEGIN IMMEDIATE")  # nobody else writes between the backup and the change
        _back_up(file, backup)
        num_paths = sum(
            connection.execute(
                f"UPDATE {table} SET {column} = moved({column}) WHERE moved({column}) <> {column} AND {ONLY.get(table, '1')}"
            ).rowcount
            for table, column in _columns(connection)
        )
        connection.execute("COMMIT")
    return Fixed(old=left, num_paths=num_paths, backup=backup)


def _back_up(file: Path, backup: Path) -> None:
    with (
        atomic_path(backup) as temporary,
        closing(sqlite3.connect(file)) as source,
        closing(sqlite3.connect(temporary)) as target,
    ):
        source.backup(target)


def _columns(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Return the columns that this version of MLflow's tables has."""
    return [
        (table, column)
        for table, columns in PATHS.items()
        for _, column, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall()
        if column in columns
    ]


def local_path(location: str) -> Path | None:
    """Return the path of a place on this machine's disk, None for one in a bucket or on a server."""
    if location.startswith("file:"):
        return Path(unquote(urlsplit(location).path))
    return Path(location) if Path(location).is_absolute() else None
