"""Stage bundle: pack the runs of a pipeline into one file, or unpack such a file into this store."""

import logging
from pathlib import Path

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.settings import plain
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.tracking.bundle import pack, unpack

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Pack or unpack."""
    match cfg.bundle.run, cfg.bundle.output, cfg.bundle.input:
        case str(run_id), str(output), None:
            pack_pipeline(cfg, workspace, run_id, Path(output))
        case None, None, str(source):
            unpack_pipeline(cfg, workspace, Path(source))
        case _:
            raise ConfigError(
                "bundle: give bundle.run=ID and bundle.output=FILE to pack a pipeline, or bundle.input=FILE to unpack"
            )


def pack_pipeline(cfg: Config, workspace: Workspace, run_id: str, target: Path) -> None:
    """Write the bundle of a pipeline."""
    num_runs = pack(run_id, target, cfg.mlflow, cache=workspace.cache, redactor=Redactor(settings=plain(cfg)))
    log.info("packed %d runs into %s, %.1f MB", num_runs, target, target.stat().st_size / 1e6)


def unpack_pipeline(cfg: Config, workspace: Workspace, source: Path) -> None:
    """Put the runs of a bundle into the store; raise an InputError if it refuses records."""
    done = unpack(source, cfg.mlflow, journal_root=Path(cfg.paths.journal), cache=workspace.cache)
    num_known = done.num_runs - done.num_new
    log.info("%s, run %s: %d runs put into the store, %d were there", done.what, done.run_id, done.num_new, num_known)
    if done.num_refused:
        raise InputError(
            f"the store refuses {done.num_refused} records of {source}: delivered.jsonl in {cfg.paths.journal} has the reasons"
        )
