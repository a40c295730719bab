"""Stage link: tag the runs whose results a commit's dvc.lock has with that commit."""

import logging

from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.tracking.commits import link_commit
from prostate_seg.tracking.store.run_tree import is_deleted

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Tag the runs and log a line per stage. A run itself can only record the commit before."""
    commit, matches = link_commit(cfg.link.commit, cfg.mlflow, cache=workspace.cache)
    for stage, run in matches.items():
        found = f"run {run.info.run_id}" if run else "no run in this store wrote these results"
        deleted = " is deleted (mlflow runs restore)" if run and is_deleted(run) else ""
        log.info("%s %-11s %s%s", commit[:12], stage, found, deleted)
