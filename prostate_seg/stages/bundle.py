"""Stage bundle: pack the runs of a pipeline into one file, or unpack such a file into this store."""

import logging
from pathlib import Path

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.settings import plain
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.tracking.bundle import pack, unpack

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Pack or unpack."""
    given = cfg.bundle
    if given.run is not None and given.output is not None and given.input is None:
        target, redactor = Path(given.output), Redactor(settings=plain(cfg))
        num_runs = pack(given.run, target, cfg.mlflow, cache=workspace.cache, redactor=redactor)
        log.info("packed %d runs into %s, %.1f MB", num_runs, target, target.stat().st_size / 1e6)
        return StageResult()
    if given.input is None or given.run is not None or given.output is not None:
        raise ConfigError(
            "bundle: give bundle.run=ID and bundle.output=FILE to pack a pipeline, or bundle.input=FILE to unpack"
        )
    source = Path(given.input)
    done = unpack(source, cfg.mlflow, journal_root=Path(cfg.paths.journal), cache=workspace.cache)
    num_known = done.num_runs - done.num_new
    log.info("%s, run %s: %d runs put into the store, %d were there", done.what, done.run_id, done.num_new, num_known)
    if done.num_refused:
        raise InputError(
            f"the store refuses {done.num_refused} records of {source}: delivered.jsonl in {cfg.paths.journal} has the reasons"
        )
    return StageResult()
