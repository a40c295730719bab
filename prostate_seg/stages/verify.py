"""Stage verify: compare everything that a run recorded with the workspace."""

import logging

from prostate_seg.common.errors import InputError
from prostate_seg.common.settings import plain
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.ds_version import read_entries
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.provenance.verification import as_json, as_table, compare

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Log a table or JSON; raise an InputError if anything is changed or missing."""
    whole = plain(cfg)
    settings = Redactor(settings=whole).tree(whole)
    if cfg.verify.run is not None:
        from prostate_seg.tracking.recorded_runs import open_tree, recorded_stages  # imports mlflow

        recorded = recorded_stages(open_tree(cfg.mlflow, cache=workspace.cache), cfg.verify.run)
    elif not (recorded := list(read_entries(workspace).items())):
        raise InputError(f"{workspace.ds_version_json} has no stage yet: run one, or name a run with verify.run=ID")
    items = [
        item for stage, record in recorded for item in compare(stage, record, settings=settings, workspace=workspace)
    ]
    is_json = cfg.verify.format == "json"
    for line in [as_json(items)] if is_json else as_table(items):
        log.info("%s", line)
    different = [item for item in items if item.verdict != "same"]
    if different:
        raise InputError(
            f"{len(different)} of {len(items)} recorded items are not the same here\n"
            "Restore them, or run the stages again; settings are compared with those of this command."
        )
