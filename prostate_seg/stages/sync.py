"""Stage sync: send what a tracking store has missed, in order and once."""

import importlib
import logging
from pathlib import Path

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Print a line per run; end with an error when the store takes less than it is sent."""
    tracking = importlib.import_module("prostate_seg.tracking.sync")  # mlflow
    draw = importlib.import_module("prostate_seg.reporting.sweeps").draw_sweep
    folder = Path(cfg.paths.spool)
    sent = tracking.sync(cfg.mlflow, folder, workspace=workspace, any_address=cfg.sync.any_address, draw=draw)
    for one in sent:
        what = f"{one.waiting.what}, {one.waiting.num_records} records"
        done = "sent" if one.run_id is None else f"sent, run {one.run_id}"
        log.info("%s: %s", what, f"{one.waiting.folder} {one.why_not}" if one.why_not else done)
    if not sent:
        log.info("nothing waits in %s", folder)
    refused = [one for one in sent if one.is_refused]
    if refused:
        raise InputError(
            f"{len(refused)} of {len(sent)} runs were not taken as a whole\n"
            "Their folders say why; all else of them is in the store. Delete the folders once you have looked."
        )
    return StageResult()
