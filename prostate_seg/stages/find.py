"""Stage find: find the runs of a commit or DVC experiment, or the origin of a run."""

import logging

from prostate_seg.common.errors import ConfigError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.tracking.commits import match_line, origin_of, runs_of_commit

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Log a line per stage of a commit, or the origin of a run."""
    match cfg.find.commit, cfg.find.run:
        case str(revision), None:
            commit, matches = runs_of_commit(revision, cfg.mlflow, cache=workspace.cache)
            log.info("commit %s", commit)
            log.info("stage       run                               status    pipeline")
            for stage, found in matches.items():
                log.info("%-11s %s", stage, match_line(found))
        case None, str(run_id):
            for line in origin_of(run_id, cfg.mlflow, cache=workspace.cache):
                log.info("%s", line)
        case _:
            raise ConfigError(
                "find: give one of find.commit=REVISION (or the name of a DVC experiment) and find.run=ID"
            )
