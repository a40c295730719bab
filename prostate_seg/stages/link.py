"""Stage link: tell the runs whose results a commit's dvc.lock holds which commit that is."""

import importlib
import logging

from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write the commit to the runs, which could only know the one before."""
    commits = importlib.import_module("prostate_seg.tracking.commits")
    commit, matches = commits.link_commit(cfg.link.commit, cfg.mlflow, cache=workspace.cache)
    for match in matches:
        found = f"run {match.run.info.run_id}" if match.run else "no run in this store wrote these results"
        if match.deleted:
            found = f"run {match.deleted.info.run_id} is deleted (mlflow runs restore)"
        log.info("%s %-11s %s", commit[:12], match.stage, found)
    return StageResult()
