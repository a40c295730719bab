"""Stage status: log for each stage whether it is current, stale or missing, why, when it ran, and its key metric."""

import logging

from prostate_seg.common.settings import plain
from prostate_seg.common.tables import table_lines
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.ds_version import known_entries
from prostate_seg.provenance.pipeline_state import as_json, as_rows, command_of_newest, pipeline_states
from prostate_seg.provenance.redaction import Redactor

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Log a table or JSON; a stale stage is no error."""
    whole = plain(cfg)
    states = pipeline_states(workspace, settings=Redactor(settings=whole).tree(whole))
    if cfg.status.format == "json":
        log.info("%s", as_json(states))
        return
    header = ["stage", "state", "finished, UTC", "took", "result", "why"]
    for line in table_lines(header, as_rows(states), numbers=["took"]):
        log.info("%s", line)
    if not known_entries(workspace):
        folder = workspace.root.absolute()
        log.info("No stage has run in %s. For another folder, cd to it or set paths.root.", folder)
    differing = [one.stage for one in states if one.other_settings]
    if differing:
        entries = known_entries(workspace)
        log.info("Settings are compared with those of this command. With those of the newest run:")
        log.info("  %s", command_of_newest({stage: entries[stage] for stage in differing}))
