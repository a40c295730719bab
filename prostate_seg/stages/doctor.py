"""Stage doctor: one line per check of what runs need, with the command that fixes what is wrong."""

import logging
from pathlib import Path

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.health import Check, Severity, check_all
from prostate_seg.tracking.journal import pending_journals

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Log the checks; raise an InputError if one of them found something that stops runs or makes their numbers doubtful."""
    checks = [*check_all(cfg, workspace), check_journals(Path(cfg.paths.journal))]
    if cfg.mlflow.tracking_uri is not None:
        from prostate_seg.tracking.store.health import check_store  # imports mlflow, which mlflow=off does without

        checks += check_store(cfg, workspace)
    for check in checks:
        log.info("%-4s %-10s %s", check.severity.value, check.name, check.text)
        if check.fix:
            log.info("%15s fix: %s", "", check.fix)
    bad = [check.name for check in checks if check.severity is Severity.bad]
    if bad:
        raise InputError(f"{len(bad)} of {len(checks)} checks found something to fix: {', '.join(bad)}")


def check_journals(folder: Path) -> Check:
    """Check for records of earlier runs that no tracking store has acknowledged."""
    found = [one for one in pending_journals(folder) if not one.is_locked]
    if not found:
        return Check("journal", f"none is pending in {folder}")
    addresses = ", ".join(sorted({one.address for one in found}))
    return Check.note("journal", f"{len(found)} pending in {folder}, for {addresses}", fix="stage=sync")
