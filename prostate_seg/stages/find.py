"""Stage find: find the runs of a commit or DVC experiment, or the origin of a run."""

import logging

from prostate_seg.common.errors import ConfigError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.tracking.commits import Match, origin_of, runs_of_commit

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Log a line per stage of a commit, or the origin of a run."""
    if cfg.find.commit is not None and cfg.find.run is None:
        commit, matches = runs_of_commit(cfg.find.commit, cfg.mlflow, cache=workspace.cache)
        log.info("commit %s", commit)
        log.info("stage       run                               status    pipeline")
        for match in matches:
            log.info("%-11s %s", match.stage, match_line(match))
    elif cfg.find.run is not None and cfg.find.commit is None:
        for line in origin_of(cfg.find.run, cfg.mlflow, cache=workspace.cache):
            log.info("%s", line)
    else:
        raise ConfigError("find: give one of find.commit=REVISION (or the name of a DVC experiment) and find.run=ID")
    return StageResult()


def match_line(match: Match) -> str:
    """Return the run of a stage as a line: id, status, pipeline."""
    run = match.run or match.deleted
    if run is None:
        return "none in this store wrote these results"
    deleted = "" if run.info.lifecycle_stage == "active" else "  deleted: mlflow runs restore"
    return f"{run.info.run_id}  {run.info.status:<8}  {run.data.tags.get('pipeline', '')}{deleted}"
