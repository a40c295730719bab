"""Stage link: tag the runs whose results a commit's dvc.lock has with that commit."""

import logging

from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.tracking.commits import link_commit

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Tag the runs and log a line per stage. A run itself can only record the commit before."""
    commit, matches = link_commit(cfg.link.commit, cfg.mlflow, cache=workspace.cache)
    for match in matches:
        found = f"run {match.run.info.run_id}" if match.run else "no run in this store wrote these results"
        if match.deleted:
            found = f"run {match.deleted.info.run_id} is deleted (mlflow runs restore)"
        log.info("%s %-11s %s", commit[:12], match.stage, found)
    return StageResult()
