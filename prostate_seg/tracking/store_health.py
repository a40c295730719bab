"""The doctor's questions to the tracking store; opening it checks its tables too."""

import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prostate_seg.common.address import resolved_uri, sqlite_file
from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.health import Finding, Severity
from prostate_seg.operations.process import is_alive, is_silent
from prostate_seg.tracking.run_tree import SILENT_ON_ANOTHER_HOST, Level, RunTree
from prostate_seg.tracking.store import Store, lock_of, open_store, unusable
from prostate_seg.tracking.store_paths import fix_paths


def check_store(cfg: Config, workspace: Workspace) -> list[Finding]:
    """Open the store, close what killed runs left open, and look whether artifacts can be written."""
    try:
        fixed = _fixed_paths(cfg) if cfg.doctor.fix_paths else []
        store = open_store(cfg.mlflow, cache=workspace.cache)
        return [*fixed, *store.ask(lambda: _findings(store, close_silent=cfg.doctor.close_silent), locked=True)]
    except InputError as error:
        return [_unusable(str(error))]


def _fixed_paths(cfg: Config) -> list[Finding]:
    """Replace the paths of a store that was moved or copied.

    Raises:
        InputError: If its file cannot be read or written.
    """
    address = resolved_uri(str(cfg.mlflow.tracking_uri))
    file = sqlite_file(address)
    if file is None or not file.exists():
        return [Finding(name="paths", severity=Severity.good, text="only those of a sqlite file can be fixed")]
    try:
        with lock_of(file):
            fixed = fix_paths(file, experiment=cfg.mlflow.experiment)
    except (sqlite3.Error, OSError) as error:
        raise InputError(unusable(address, error)) from error
    if fixed is None:
        return [Finding(name="paths", severity=Severity.good, text=f"nothing to fix in {file}")]
    old = ", ".join(map(str, fixed.old))
    text = f"{fixed.num_paths} paths below {old} are now below {file.parent}; {file.name} as it was: {fixed.backup}"
    return [Finding(name="paths", severity=Severity.good, text=text)]


def _findings(store: Store, *, close_silent: bool) -> list[Finding]:
    tree = RunTree(store)
    closed = tree.close_orphans(close_silent=close_silent)
    running = [run for run in tree.search(status="RUNNING") if run.data.tags.get("level") != Level.pipeline.value]
    silent = [
        run
        for run in running
        if is_alive(run.data.tags) is None and is_silent(run.data.tags, since=SILENT_ON_ANOTHER_HOST)
    ]
    text = f"{store.address} answers, its tables are current"
    return [
        Finding(name="tracking", severity=Severity.good, text=text),
        _artifacts(store),
        Finding(
            name="runs",
            severity=Severity.good,
            text=f"{len(closed)} of killed processes closed, {len(running)} running",
        ),
        *([_silent(len(silent))] if silent else []),
    ]


def _artifacts(store: Store) -> Finding:
    location = store.client.get_experiment(store.experiment_id).artifact_location
    if urlsplit(location).scheme not in ("", "file"):
        return Finding(name="artifacts", severity=Severity.good, text=location)
    folder = Path(unquote(urlsplit(location).path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror}"
        return Finding(
            name="artifacts", severity=Severity.bad, text=text, fix="create it, or choose another mlflow.experiment"
        )
    return Finding(name="artifacts", severity=Severity.good, text=str(folder))


def _silent(number: int) -> Finding:
    return Finding(
        name="silent",
        severity=Severity.note,
        text=f"{number} runs of other hosts have given no sign of life for an hour",
        fix="stage=doctor on those hosts, or here with doctor.close_silent=true",
    )


def _unusable(text: str) -> Finding:
    first, *rest = text.splitlines()
    return Finding(name="tracking", severity=Severity.bad, text=first, fix=" ".join(rest))
