"""Stage find: from a commit to its runs, from a run to its commit and the commands that make it again."""

import importlib
import logging

from prostate_seg.common.errors import ConfigError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Print a line per stage of a commit, or all that leads back to a run."""
    if (cfg.find.commit is None) == (cfg.find.run is None):
        raise ConfigError("find: give one of find.commit=REVISION (or the name of a DVC experiment) and find.run=ID")
    if cfg.find.commit is not None:
        commits = importlib.import_module("prostate_seg.tracking.commits")
        commit, matches = commits.runs_of_commit(cfg.find.commit, cfg.mlflow, cache=workspace.cache)
        log.info("commit %s", commit)
        log.info("stage       run                               status    pipeline")
        for match in matches:
            log.info("%-11s %s", match.stage, _line(match.run or match.deleted))
        return StageResult()
    origin = importlib.import_module("prostate_seg.tracking.origin")
    for line in origin.origin_of(cfg.find.run, cfg.mlflow, cache=workspace.cache):
        log.info("%s", line)
    return StageResult()


def _line(run: object) -> str:
    if run is None:
        return "none in this store wrote these results"
    info, tags = run.info, run.data.tags  # type: ignore[attr-defined]
    deleted = "" if info.lifecycle_stage == "active" else "  deleted: mlflow runs restore"
    return f"{info.run_id}  {info.status:<8}  {tags.get('pipeline', '')}{deleted}"
