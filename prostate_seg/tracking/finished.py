"""Skips a stage whose last run had the same settings, inputs and code, while its outputs are still in place.

Used by mlflow.skip_finished. Versions of packages are not compared; stage=verify compares them.
"""

import logging

from prostate_seg.config.schema import Config, as_container, science_of
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.operations.job import Job
from prostate_seg.provenance.ds_version import entry_name, read_entries, recording_workspace
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.provenance.verification import Verdict, compare

log = logging.getLogger(__name__)


def finished_before(cfg: Config, workspace: Workspace, job: Job) -> StageResult | None:
    """Return the result of an identical run; None if the stage must run, and log the reason.

    Raises:
        InputError: If DS_VERSION.json or the tracking store cannot be used.
    """
    name = entry_name(cfg)
    entry = read_entries(recording_workspace(cfg, workspace)).get(name)
    if (
        entry is None or not entry["outputs"]
    ):  # outputs outside of the workspace, as of stage=register, are not compared
        return None
    settings = Redactor(settings=as_container(cfg)).tree(science_of(cfg))
    items = compare(name, entry, settings=settings, workspace=workspace, deciding_only=True)
    different = next((item for item in items if item.verdict is not Verdict.same), None)
    if different is not None:
        log.info("%s runs again: %s %s is %s", name, different.kind, different.name, different.verdict.value)
        return None
    run_id = entry["run_id"]
    if cfg.mlflow.tracking_uri is not None and run_id is not None:
        from prostate_seg.tracking.sweeps import reuse_finished_run  # imports mlflow, which mlflow=off does without

        if not reuse_finished_run(cfg, job, run_id):
            log.info("%s runs again: run %s of it is not among the finished runs of this store", name, run_id)
            return None
    log.info(
        "%s is skipped:%s of %s, finished %s, had the same settings, inputs and code, and its outputs are in place",
        name,
        "" if run_id is None else f" run {run_id}",
        entry["pipeline"],
        entry["finished_at"],
    )
    return StageResult(metrics=entry["metrics"], **entry["sought"])
