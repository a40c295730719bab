"""Checks of the tracking store for stage=doctor; opening it checks its tables, too."""

from prostate_seg.common.address import resolved_uri, sqlite_file
from prostate_seg.common.errors import InputError, first_line
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.health import Check, check_folder
from prostate_seg.tracking.records import Level
from prostate_seg.tracking.store.connection import Store, explained_errors, lock_of, open_store
from prostate_seg.tracking.store.paths import fix_paths, local_path
from prostate_seg.tracking.store.run_tree import RunTree, is_silent_elsewhere


def check_store(cfg: Config, workspace: Workspace) -> list[Check]:
    """Open the store, close the runs of killed processes, and check that artifacts can be written."""
    try:
        fixed = [_fix_paths(cfg)] if cfg.doctor.fix_paths else []
        store = open_store(cfg.mlflow, cache=workspace.cache)
        return [*fixed, *store.call(lambda: _checks(store, close_silent=cfg.doctor.close_silent), locked=True)]
    except InputError as error:
        return [Check.bad("tracking", first_line(error), fix=" ".join(str(error).splitlines()[1:]))]


def _fix_paths(cfg: Config) -> Check:
    """Replace the artifact paths of a store that was moved or copied."""
    address = resolved_uri(str(cfg.mlflow.tracking_uri))
    file = sqlite_file(address)
    if file is None or not file.exists():
        return Check("paths", "only those of a sqlite file can be fixed")
    with explained_errors(address), lock_of(file):
        return Check("paths", fix_paths(file, experiment=cfg.mlflow.experiment))


def _checks(store: Store, *, close_silent: bool) -> list[Check]:
    tree, location = RunTree(store), store.client.get_experiment(store.experiment_id).artifact_location
    artifacts = local_path(location)
    closed = tree.close_orphans(close_silent=close_silent)
    running = [run for run in tree.search(status="RUNNING") if run.data.tags.get("level") != Level.pipeline]
    silent = list(filter(is_silent_elsewhere, running))
    checks = [
        Check("tracking", f"{store.address} answers, its tables are current"),
        Check("artifacts", location) if artifacts is None else check_folder("artifacts", artifacts),
        Check("runs", f"{len(closed)} of killed processes closed, {len(running)} running"),
    ]
    if silent:
        text = f"{len(silent)} runs of other hosts have sent no heartbeat for an hour"
        fix = "stage=doctor on those hosts, or here with doctor.close_silent=true"
        checks.append(Check.note("silent", text, fix=fix))
    return checks
