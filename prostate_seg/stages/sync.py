"""Stage sync: replicate the journals that wait on disk into the tracking store, in order and once."""

import logging
from pathlib import Path

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.sweeping.figures import draw_sweep
from prostate_seg.tracking.sync import sync

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Log a line per run; raise an InputError if the store refuses some of the records."""
    root = Path(cfg.paths.journal)
    synced = sync(cfg.mlflow, root, workspace=workspace, any_address=cfg.sync.any_address, draw=draw_sweep)
    for one in synced:
        sent = "sent" if one.run_id is None else f"sent, run {one.run_id}"
        result = f"{one.journal.folder} {one.reason}" if one.reason else sent
        log.info("%s, %d records: %s", one.journal.what, one.journal.num_records, result)
    if not synced:
        log.info("no journal is pending in %s", root)
    refused = [one for one in synced if one.is_refused]
    if refused:
        raise InputError(
            f"{len(refused)} of {len(synced)} journals have records that the store rejects\n"
            "Read the reasons in delivered.jsonl of their folders, then delete these; all other records are in the store."
        )
