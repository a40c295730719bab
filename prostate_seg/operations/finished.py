"""Whether a stage need not run: its last run had the same settings, inputs and code, and what it wrote is still in place."""

import importlib
import logging

from prostate_seg.config.schema import Config, as_container, science_of
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.operations.job import Job
from prostate_seg.provenance.ds_version import read_entries
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.provenance.verification import Verdict, compare
from prostate_seg.tracking.stage_run import entry_name, recording_workspace

log = logging.getLogger(__name__)

NOT_COMPARED = "packages"
"""A package's version may be another; stage=verify says which is."""


def finished_before(cfg: Config, workspace: Workspace, job: Job) -> StageResult | None:
    """Return the result of an identical run, and say which it is; None when the stage must run, with the reason.

    Raises:
        InputError: If DS_VERSION.json or the tracking store cannot be used.
    """
    name = entry_name(cfg)
    record = read_entries(recording_workspace(cfg, workspace)).get(name)
    if record is None or not record["outputs"]:  # what was written elsewhere, as by stage=register, cannot be looked at
        return None
    settings = Redactor(settings=as_container(cfg)).tree(science_of(cfg))
    items = compare(name, record, settings=settings, workspace=workspace)
    other = [item for item in items if item.kind != NOT_COMPARED and item.verdict is not Verdict.same]
    if other:
        log.info("%s runs again: %s %s is %s", name, other[0].kind, other[0].name, other[0].verdict.value)
        return None
    run_id = record["run_id"]
    if cfg.mlflow.tracking_uri is not None and run_id is not None:
        sweeps = importlib.import_module("prostate_seg.tracking.sweeps")  # mlflow
        if not sweeps.take_over(cfg, job, run_id):
            log.info("%s runs again: run %s of it is not among the finished runs of this store", name, run_id)
            return None
    shown = "" if run_id is None else f" run {run_id}"
    log.info(
        "%s is skipped:%s of %s, finished %s, had the same settings, inputs and code, and its outputs are in place",
        name,
        shown,
        record["pipeline"],
        record["finished_at"],
    )
    return StageResult(metrics=record["metrics"], **record["sought"])
